"""Semantic calibration (SC): moving pretrained features to where the downstream features are.

DR-Tune (https://arxiv.org/abs/2308.12058), section 3.4, eq. 7-12. The steps are functions of
:mod:`~drtune_ray.method.equations`; here is what lasts between them: R and when it is refreshed.
Legend: K bank rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.collective import ALONE, Collective
from drtune_ray.method.diagnostics import centre_distance, turning_angle
from drtune_ray.method.equations import (
    SIMILARITIES,
    Similarity,
    calibrated_features,
    class_level_translation,
    confidence_guided_weights,
    inverse_norms,
)
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


class SemanticCalibration(nn.Module):
    """Rotate all rows, then translate each class (eq. 12).

    State: the rotation in use and the number of steps, by which the next refresh is due; both in
    ``state_dict``.

    Differs from the authors' code, which these arguments reproduce: ``rotation_solver="svd",
    rotation_kept=False, restart_each_epoch=True, proper_rotation=True, recenter=False,
    similarity="cosine", confidence_temperature=1.0``. By default the rotation is kept between
    refreshes (theirs is dropped after the step that computed it), refreshed at intervals counted
    over the whole training, and the rotated rows are moved to the mean of the downstream rows. A
    class with one row is translated as any other. Both L2-normalise before and after, as
    `normalize` does. By default the rotation is shrunk and of limited rank, where eq. 7 asks for
    the exact one.

    Args:
        num_features: D.
        rotation: Apply the global rotation (GR).
        rotation_interval: Steps between two refreshes of R; 1 refreshes at every step.
        rotation_solver: ``randomized`` (:func:`~drtune_ray.method.rotation.subspace_rotation`,
            started from the last solution) or ``svd`` (exact).
        rotation_rank: Rank r of R; read by ``randomized`` only.
        rotation_shrinkage: Singular value, over the norm of all, that is shrunk to 1/sqrt(2); read
            by ``randomized`` only.
        rotation_kept: Apply the last R at the steps between refreshes; otherwise those steps are
            not rotated.
        restart_each_epoch: Count the interval from each epoch's first step.
        proper_rotation: Ask for det R = +1; read by ``svd`` only.
        recenter: Move the rotated rows to the mean of the downstream rows. Without effect where
            `translation` is on: a shift common to all rows cancels in eq. 12.
        normalize: L2-normalise both features first; normalise the result and multiply by `scale`.
        translation: Apply the class-level translation (CLT).
        confidence_weighting: Weight the downstream rows of a class by confidence (CGA); otherwise
            their plain mean is its centre.
        confidence_temperature: Divisor of the similarity in eq. 10; above 0.
        similarity: ``dot`` (eq. 10) or ``cosine``.

    Raises:
        ValueError: If the solver or the similarity is unknown or a number is out of range.
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
        """Number of steps so far and whether R was ever solved, for ``state_dict``."""
        return {"num_steps": self._num_steps, "is_solved": self._is_solved}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self._num_steps, self._is_solved = state["num_steps"], bool(state["is_solved"])

    @property
    def applied_rotation(self) -> Rotation | None:
        """R in use; None where there is none (yet)."""
        return self._stored_rotation if self._is_solved else None

    @property
    def _stored_rotation(self) -> Rotation:
        return Rotation(self.rotation_left, self.rotation_right, self.rotation_rest)

    def begin_epoch(self) -> None:
        """Start an epoch, whose first step refreshes R if `restart_each_epoch`."""
        if self.restart_each_epoch:
            self._num_steps = 0

    def forward(
        self,
        pretrained: Tensor,
        downstream: Tensor,
        labels: Tensor,
        prototypes: Tensor,
        scale: Tensor | float = 1.0,
        collective: Collective = ALONE,
    ) -> Tensor:
        """Calibrate the pretrained rows of the bank; one call is one step.

        Args:
            pretrained: v^p of the bank, shape (K, D).
            downstream: v^d of the bank, shape (K, D).
            labels: Shape (K,).
            prototypes: phi, shape (C, D).
            scale: Norm of the calibrated rows where `normalize`: the mean norm of the batch's
                downstream features.
            collective: Processes that divide the K rows; one of them solves R for all.

        Returns:
            v^ without gradient, shape (K, D); only this process's rows if several divide them.
        """
        is_due = self._num_steps % self.rotation_interval == 0
        self._num_steps += 1
        if self.rotation and is_due:
            self._refresh(pretrained.detach(), downstream.detach(), collective)
        rotates = self.rotation and (is_due or self.rotation_kept)
        return self.calibrated(
            pretrained,
            downstream,
            labels,
            prototypes,
            scale,
            rotates=rotates,
            collective=collective,
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
        collective: Collective = ALONE,
    ) -> Tensor:
        """Calibrate with the present R, or with none (eq. 12), in float32 at least.

        Takes and returns what :meth:`forward` does, without counting a step or refreshing R.
        """
        own = collective.block(len(labels)).own
        mean = partial(collective.mean, num_rows=len(labels))
        # Mixed precision is for the encoder: calibration is float32 at least.
        with torch.autocast(pretrained.device.type, enabled=False):
            pretrained = at_least_float32(pretrained[own])
            downstream = at_least_float32(downstream[own])
            prototypes = prototypes.to(pretrained.dtype)
            rows = self._rotated(pretrained, downstream, rotates, mean)
            if self.translation:
                classes = collective.class_rows(labels, len(prototypes))
                weights = self._row_weights(downstream, classes, prototypes)
                translation = class_level_translation(rows, downstream, classes, weights)
                rows = calibrated_features(rows, collective.sum(translation), classes)
            return rows.mul_(scale * inverse_norms(rows)) if self.normalize else rows

    @torch.no_grad()
    def diagnostics(
        self, pretrained: Tensor, downstream: Tensor, calibrated: Tensor, classes: ClassRows
    ) -> dict[str, Tensor]:
        """Drift of the class centres before and after calibration, and the angle by which R turns.

        Args:
            pretrained: v^p of the bank, shape (K, D).
            downstream: v^d of the bank, shape (K, D).
            calibrated: v^, from :meth:`calibrated`, shape (K, D).
            classes: Class of each row.
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
        self,
        pretrained: Tensor,
        downstream: Tensor,
        rotates: bool,
        mean: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """R (v^p - mean v^p) + mean v^d, or v^p where it is not rotated: new rows, (K, D)."""
        rows = pretrained * (inverse_norms(pretrained) if self.normalize else 1.0)
        rotation = self.applied_rotation
        if not rotates or rotation is None:
            return rows
        rotation = rotation.map(lambda part: part.to(rows.dtype))
        if self.translation:  # a shift common to all rows cancels (row q of docs/method.md)
            return rotation.apply_(rows)
        rows = rotation.apply_(rows.sub_(mean(rows)))
        if self.recenter:
            target = F.normalize(downstream, dim=1) if self.normalize else downstream
            rows += mean(target)
        return rows

    def _row_weights(self, downstream: Tensor, classes: ClassRows, prototypes: Tensor) -> Tensor:
        """Weight of each downstream row, before normalisation, in the centre of its class, (K,)."""
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

    def _refresh(self, pretrained: Tensor, downstream: Tensor, collective: Collective) -> None:
        """Solve R from the rows as they are, unrotated."""
        rows = at_least_float32(pretrained), at_least_float32(downstream)

        def settled(rotation: Rotation) -> Rotation:
            # A loaded one is contiguous: the products then round alike.
            return rotation.map(lambda part: part.to(rows[0].dtype).contiguous())

        def solve() -> Rotation:
            with torch.autocast(pretrained.device.type, enabled=False):
                return settled(self._solved(*rows))

        solved = collective.solved_once(solve, like=settled(self._stored_rotation))
        self.rotation_left, self.rotation_right, self.rotation_rest = solved
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


def _check(holds: bool, given: str, condition: str) -> None:
    if not holds:
        raise ValueError(f"{condition} must hold, but got {given}")
