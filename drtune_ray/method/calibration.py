"""Semantic calibration (SC): moving pretrained features to where the downstream features are.

DR-Tune (https://arxiv.org/abs/2308.12058), section 3.4, eq. 7-12.
Legend: K bank rows, D features, C classes.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.collective import Collective, OneProcess, own_block
from drtune_ray.method.diagnostics import centre_distance, turning_angle
from drtune_ray.method.precision import at_least_float32
from drtune_ray.method.rotation import (
    COLD_ITERATIONS,
    WARM_ITERATIONS,
    Rotation,
    centred,
    check_solver,
    exact_rotation,
    random_start,
    subspace_rotation,
    warm_start,
)

Similarity = Literal["cosine", "dot"]
SIMILARITIES = get_args(Similarity)
NORM_FLOOR = 1e-12  # that of torch.nn.functional.normalize


def confidence_guided_weights(
    downstream: Tensor,
    classes: ClassRows,
    prototypes: Tensor,
    *,
    temperature: float = 1.0,
    similarity: Similarity = "dot",
    row_scale: Tensor | None = None,
) -> Tensor:
    """Weight of each downstream row in its class centre (eq. 9-10).

    Softmax over the rows of the class of ``similarity(phi_c, v^d_k) / temperature``.

    Differs from the authors' code: they take the cosine at temperature 1, which makes the weights
    nearly uniform; ``similarity="cosine"`` reproduces that.

    Args:
        downstream: v^d, shape (K, D).
        classes: Which class each row belongs to.
        prototypes: phi, shape (C, D).
        temperature: Divides the similarity; above 0.
        similarity: ``dot`` (eq. 10) or ``cosine``.
        row_scale: Multiplies each row first, shape (K, 1).

    Returns:
        Weights, shape (K,), summing to 1 over the rows of each class that has rows.
    """
    if similarity == "cosine":
        prototypes = F.normalize(prototypes, dim=1)
        row_scale = inverse_norms(downstream) if row_scale is None else row_scale
    scores = classes.dot(downstream, prototypes)
    if row_scale is not None:
        scores = scores * row_scale.squeeze(1)
    return classes.softmax(scores, temperature)


def inverse_norms(rows: Tensor) -> Tensor:
    """1 / length of each row, (K, D) -> (K, 1); finite for a zero row, which stays zero."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms.clamp(min=NORM_FLOOR).reciprocal()


def class_level_translation(
    rotated: Tensor, downstream: Tensor, classes: ClassRows, weights: Tensor
) -> Tensor:
    """delta_c = mu^d_c - mu^p_c for each class (eq. 8, 11).

    Args:
        rotated: R v^p, shape (K, D).
        downstream: v^d, shape (K, D).
        classes: Which class each row belongs to.
        weights: Of the downstream rows, shape (K,), summing to 1 over each class.

    Returns:
        Shape (C, D); zero for a class without rows.
    """
    return classes.total(classes.sums(downstream, weights) - classes.means(rotated))


class SemanticCalibration(nn.Module):
    """Rotation of all rows, then a translation for each class (eq. 12).

    State: the rotation in use and the number of steps, which says when the next is due; both in
    ``state_dict``.

    Differs from the authors' code where the arguments say otherwise than theirs, which are
    ``rotation_solver="svd", rotation_kept=False, restart_each_epoch=True, proper_rotation=True,
    recenter=False, similarity="cosine", confidence_temperature=1.0``: the rotation is kept between
    refreshes (theirs is dropped after the step that computed it), counted over the whole training,
    and the rotated rows are moved to the mean of the downstream rows. A class with one row is
    translated as any other. They L2-normalise before and after, as `normalize` does. By default
    the rotation is shrunk and of limited rank, where eq. 7 asks for the exact one.

    Args:
        num_features: D.
        rotation: Apply the global rotation (GR).
        rotation_interval: Steps between two refreshes of R; 1 refreshes at every step.
        rotation_solver: ``randomized`` (:func:`~drtune_ray.method.rotation.subspace_rotation`,
            started from the last solution) or ``svd`` (exact).
        rotation_rank: Rank r of R; read by ``randomized`` only.
        rotation_shrinkage: How little evidence is shrunk; read by ``randomized`` only.
        rotation_kept: Apply the last R at the steps between refreshes; otherwise those steps are
            not rotated.
        restart_each_epoch: Count the interval from each epoch's first step.
        proper_rotation: Ask for det R = +1; read by ``svd`` only.
        recenter: Move the rotated rows to the mean of the downstream rows. Without effect where
            `translation` is on: a shift common to all rows cancels in eq. 12.
        normalize: L2-normalise both features first; normalise the result and multiply by `scale`.
        translation: Apply the class-level translation (CLT).
        confidence_weighting: Weight its downstream rows by confidence (CGA); else a plain mean.
        confidence_temperature: See :func:`confidence_guided_weights`.
        similarity: See :func:`confidence_guided_weights`.
        collective: Where several processes hold the same bank: one solves R for all, and each
            calibrates its block of the rows.

    Raises:
        ValueError: For an unknown solver or similarity, or a number out of its range.
    """

    rotation_left: Tensor
    rotation_right: Tensor | None
    rotation_rest: Tensor | None
    rotation_start: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        rotation: bool = True,
        rotation_interval: int = 10,
        rotation_solver: str = "randomized",
        rotation_rank: int = 32,
        rotation_shrinkage: float = 0.02,
        rotation_kept: bool = True,
        restart_each_epoch: bool = False,
        proper_rotation: bool = False,
        recenter: bool = True,
        normalize: bool = True,
        translation: bool = True,
        confidence_weighting: bool = True,
        confidence_temperature: float = 0.1,
        similarity: Similarity = "cosine",
        collective: Collective | None = None,
    ) -> None:
        super().__init__()
        check_solver(rotation_solver, rotation_rank, rotation_shrinkage)
        if similarity not in SIMILARITIES:
            raise ValueError(
                f"similarity must be one of {list(SIMILARITIES)}, but got similarity={similarity!r}"
            )
        _check(rotation_interval >= 1, f"{rotation_interval=}", "rotation_interval >= 1")
        _check(
            confidence_temperature > 0, f"{confidence_temperature=}", "confidence_temperature > 0"
        )
        self.rotation = rotation
        self.rotation_interval = rotation_interval
        self.rotation_solver = rotation_solver
        self.rotation_shrinkage = rotation_shrinkage
        self.rotation_kept = rotation_kept
        self.restart_each_epoch = restart_each_epoch
        self.proper_rotation = proper_rotation
        self.recenter = recenter
        self.normalize = normalize
        self.translation = translation
        self.confidence_weighting = confidence_weighting
        self.confidence_temperature = confidence_temperature
        self.similarity: Similarity = similarity
        self.collective = collective or OneProcess()
        left, right = None, None
        if rotation and rotation_solver == "svd":
            left = torch.eye(num_features)
        elif rotation:
            right = random_start(num_features, rotation_rank)
            left = torch.zeros_like(right)
        self.register_buffer("rotation_left", left)
        self.register_buffer("rotation_right", right)
        self.register_buffer("rotation_rest", None if right is None else torch.zeros(()))
        start = None if right is None else right.clone()  # loading a state writes into `right`
        self.register_buffer("rotation_start", start, persistent=False)
        # Plain integers, so that reading them never waits for an accelerator.
        self._num_steps, self._is_solved = 0, False

    def get_extra_state(self) -> dict[str, int]:
        """Steps counted so far and whether R was ever solved, for ``state_dict``."""
        return {"num_steps": self._num_steps, "is_solved": self._is_solved}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Counterpart of :meth:`get_extra_state`."""
        self._num_steps, self._is_solved = state["num_steps"], bool(state["is_solved"])

    @property
    def applied_rotation(self) -> Rotation | None:
        """R in use; None where there is none (yet)."""
        if not self._is_solved:
            return None
        return Rotation(self.rotation_left, self.rotation_right, self.rotation_rest)

    def begin_epoch(self) -> None:
        """Tell that an epoch starts: its first step refreshes R if `restart_each_epoch`."""
        if self.restart_each_epoch:
            self._num_steps = 0

    def forward(
        self,
        pretrained: Tensor,
        downstream: Tensor,
        labels: Tensor,
        prototypes: Tensor,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """Calibrate the bank's pretrained rows; one call is one step.

        Args:
            pretrained: z^p of the bank, shape (K, D).
            downstream: z^d of the bank, shape (K, D).
            labels: Shape (K,).
            prototypes: phi, shape (C, D).
            scale: Norm of the calibrated rows where `normalize`: the mean norm of the batch's
                downstream features.

        Returns:
            Calibrated features without gradient, shape (K, D); with several processes those of
            this process's block of the rows
            (:func:`~drtune_ray.method.collective.own_block`).
        """
        is_due = self._num_steps % self.rotation_interval == 0
        self._num_steps += 1
        if self.rotation and is_due:
            self._refresh(pretrained.detach(), downstream.detach())
        rotates = self.rotation and (is_due or self.rotation_kept)
        return self.calibrated(
            pretrained,
            downstream,
            labels,
            prototypes,
            scale,
            rotates=rotates,
            collective=self.collective,
        )

    @torch.no_grad()
    def calibrated(
        self,
        pretrained: Tensor,
        downstream: Tensor,
        labels: Tensor,
        prototypes: Tensor,
        scale: Tensor | float = 1.0,
        *,
        rotates: bool,
        collective: Collective | None = None,
    ) -> Tensor:
        """Eq. 12 with the present R (or without), in float32 at least; shapes as for `forward`.

        Without `collective` this process calibrates all rows by itself.
        """
        collective = collective or OneProcess()
        own = own_block(len(labels), collective)
        # Mixed precision is for the encoder: calibration is float32 at least.
        with torch.autocast(pretrained.device.type, enabled=False):
            pretrained = at_least_float32(pretrained[own])
            downstream = at_least_float32(downstream[own])
            prototypes = prototypes.to(pretrained.dtype)
            rows = self._rotated(pretrained, downstream, rotates, collective)
            if self.translation:
                classes = ClassRows(labels, len(prototypes), collective)
                weights = self._row_weights(downstream, classes, prototypes)
                classes.add_(rows, class_level_translation(rows, downstream, classes, weights))
            return rows.mul_(scale * inverse_norms(rows)) if self.normalize else rows

    @torch.no_grad()
    def diagnostics(
        self, pretrained: Tensor, downstream: Tensor, calibrated: Tensor, classes: ClassRows
    ) -> dict[str, Tensor]:
        """Drift of the class centres before and after calibration, and how far R turns the rows.

        Args:
            pretrained: z^p of the bank, shape (K, D).
            downstream: z^d of the bank, shape (K, D).
            calibrated: What :meth:`calibrated` made of them, shape (K, D).
            classes: Which class each row belongs to.
        """
        if self.normalize:
            pretrained, downstream, calibrated = (
                F.normalize(rows, dim=1) for rows in (pretrained, downstream, calibrated)
            )
        found = {
            "semantic_drift": centre_distance(pretrained, downstream, classes),
            "semantic_drift_remaining": centre_distance(calibrated, downstream, classes),
        }
        if self.applied_rotation is not None:
            rotation = self.applied_rotation.map(lambda part: part.to(pretrained.dtype))
            rows = centred(pretrained)
            found["rotation_angle"] = turning_angle(rows, rotation.apply_(rows.clone()))
        return found

    def _rotated(
        self, pretrained: Tensor, downstream: Tensor, rotates: bool, collective: Collective
    ) -> Tensor:
        """R (v^p - mean v^p) + mean v^d, or v^p where it is not rotated: new rows, (K, D)."""
        rows = pretrained * (inverse_norms(pretrained) if self.normalize else 1.0)
        rotation = self.applied_rotation
        if not rotates or rotation is None:
            return rows
        rotation = rotation.map(lambda part: part.to(rows.dtype))
        if self.translation:  # a shift common to all rows cancels (row q of docs/method.md)
            return rotation.apply_(rows)
        rows = rotation.apply_(rows.sub_(_mean(rows, collective)))
        if self.recenter:
            target = F.normalize(downstream, dim=1) if self.normalize else downstream
            rows += _mean(target, collective)
        return rows

    def _row_weights(self, downstream: Tensor, classes: ClassRows, prototypes: Tensor) -> Tensor:
        """Weight of each downstream row, as it is, in the centre of its class, (K,)."""
        row_scale = inverse_norms(downstream) if self.normalize else None
        if self.confidence_weighting:
            weights = confidence_guided_weights(
                downstream,
                classes,
                prototypes,
                temperature=self.confidence_temperature,
                similarity=self.similarity,
                row_scale=row_scale,
            )
        else:
            weights = classes.plain_weights(downstream.dtype)
        return weights if row_scale is None else weights * row_scale.squeeze(1)

    def _refresh(self, pretrained: Tensor, downstream: Tensor) -> None:
        """Solve R from the rows as they are, unrotated; one process for all."""
        rows = at_least_float32(pretrained), at_least_float32(downstream)
        rotation = Rotation(self.rotation_left, self.rotation_right, self.rotation_rest)
        if self.collective.rank == 0:
            with torch.autocast(pretrained.device.type, enabled=False):
                rotation = self._solved(*rows)
        shared = _broadcast(
            # A loaded one is contiguous: the products then round alike.
            rotation.map(lambda part: part.to(rows[0].dtype).contiguous()),
            self.collective,
        )
        self.rotation_left, self.rotation_right, self.rotation_rest = shared
        self._is_solved = True

    def _solved(self, pretrained: Tensor, downstream: Tensor) -> Rotation:
        source, target = (
            centred(rows, inverse_norms(rows) if self.normalize else None)
            for rows in (pretrained, downstream)
        )
        if self.rotation_right is None:
            return exact_rotation(source, target, proper=self.proper_rotation)
        former = self.applied_rotation
        return subspace_rotation(
            source,
            target,
            self.rotation_start if former is None else warm_start(former, self.rotation_start),
            shrinkage=self.rotation_shrinkage,
            num_iterations=COLD_ITERATIONS if former is None else WARM_ITERATIONS,
        )


def _mean(rows: Tensor, collective: Collective) -> Tensor:
    """Mean over the rows of all processes: (K, D) -> (D,)."""
    if collective.world_size == 1:
        return rows.mean(0)
    num_rows = rows.new_full((1,), float(len(rows)))
    total = collective.sum(torch.cat([rows.sum(0), num_rows]))
    return total[:-1] / total[-1]


def _broadcast(rotation: Rotation, collective: Collective) -> Rotation:
    """The rotation of the first process, in one message."""
    if collective.world_size == 1:
        return rotation
    parts = [part for part in rotation if part is not None]
    message = collective.broadcast(torch.cat([part.reshape(-1) for part in parts]))
    received = iter(torch.split(message, [part.numel() for part in parts]))
    return rotation.map(lambda part: next(received).view_as(part))


def _check(holds: bool, given: str, condition: str) -> None:
    if not holds:
        raise ValueError(f"{condition} must hold, but got {given}")
