"""Semantic calibration (SC): moving pretrained features to where the downstream features are.

DR-Tune (https://arxiv.org/abs/2308.12058), section 3.4, eq. 7-12.
Legend: K bank rows, D features, C classes.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drtune_ray.method.collective import Collective, OneProcess
from drtune_ray.method.rotation import check_solver, global_rotation

Similarity = Literal["cosine", "dot"]
SIMILARITIES = get_args(Similarity)


def class_sums(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum of the rows of each class: (K, D), (K,) -> (C, D); zero for a class without rows."""
    return rows.new_zeros(num_classes, rows.shape[1]).index_add_(0, labels, rows)


def class_softmax(scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Softmax of the scores over the rows of each class: (K,), (K,) -> (K,).

    The class's own maximum is subtracted first, so no temperature overflows.
    """
    maxima = scores.new_full((num_classes,), -torch.inf)
    maxima = maxima.scatter_reduce(0, labels, scores, "amax")
    weights = (scores - maxima[labels]).exp()
    totals = weights.new_zeros(num_classes).index_add_(0, labels, weights)
    return weights / totals[labels]


def confidence_guided_weights(
    downstream: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 1.0,
    similarity: Similarity = "dot",
) -> Tensor:
    """Weight of each downstream row in its class centre (eq. 9-10).

    Softmax over the rows of the class of ``similarity(phi_c, v^d_k) / temperature``.

    Differs from the authors' code: they take the cosine at temperature 1, which makes the weights
    nearly uniform; ``similarity="cosine"`` reproduces that.

    Args:
        downstream: v^d, shape (K, D).
        labels: Shape (K,).
        prototypes: phi, shape (C, D).
        temperature: Divides the similarity; above 0.
        similarity: ``dot`` (eq. 10) or ``cosine``.

    Returns:
        Weights, shape (K,), summing to 1 over the rows of each class that has rows.
    """
    if similarity == "cosine":
        downstream, prototypes = F.normalize(downstream, dim=1), F.normalize(prototypes, dim=1)
    scores = (downstream * prototypes[labels]).sum(1) / temperature
    return class_softmax(scores, labels, len(prototypes))


def class_level_translation(
    rotated: Tensor, downstream: Tensor, labels: Tensor, weights: Tensor, num_classes: int
) -> Tensor:
    """delta_c = mu^d_c - mu^p_c for each class (eq. 8, 11).

    Args:
        rotated: R v^p, shape (K, D).
        downstream: v^d, shape (K, D).
        labels: Shape (K,).
        weights: Of the downstream rows, shape (K,), summing to 1 over each class.
        num_classes: C.

    Returns:
        Shape (C, D); zero for a class without rows.
    """
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1).unsqueeze(1)
    pretrained_centres = class_sums(rotated, labels, num_classes) / counts
    return class_sums(downstream * weights.unsqueeze(1), labels, num_classes) - pretrained_centres


class SemanticCalibration(nn.Module):
    """Rotation of all rows, then a translation for each class (eq. 12).

    State: the rotation in use and the number of steps since it was due; both in ``state_dict``.

    Differs from the authors' code where the arguments say otherwise than theirs, which are
    ``rotation_kept=False, restart_each_epoch=True, proper_rotation=True, recenter=False,
    similarity="cosine", confidence_temperature=1.0``: the rotation is kept between refreshes
    (theirs is dropped after the step that computed it), counted over the whole training, and the
    rotated rows are moved to the mean of the downstream rows. A class with one row is translated
    as any other.

    Args:
        num_features: D.
        rotation: Apply the global rotation (GR).
        rotation_interval: Steps between two refreshes of R; 1 refreshes at every step.
        rotation_solver: See :func:`~drtune_ray.method.rotation.global_rotation`.
        rotation_kept: Apply the last R at the steps between refreshes; otherwise those steps are
            not rotated.
        restart_each_epoch: Count the interval from each epoch's first step.
        proper_rotation: Ask for det R = +1.
        recenter: Move the rotated rows to the mean of the downstream rows. Without effect where
            ``translation`` is on: a shift common to all rows cancels in eq. 12.
        normalize: L2-normalise both features first; normalise the result and multiply by `scale`.
        translation: Apply the class-level translation (CLT).
        confidence_weighting: Weight its downstream rows by confidence (CGA); else a plain mean.
        confidence_temperature: See :func:`confidence_guided_weights`.
        similarity: See :func:`confidence_guided_weights`.
        collective: Where several processes hold the same bank: one solves R for all.
    """

    rotation_matrix: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        rotation: bool = True,
        rotation_interval: int = 10,
        rotation_solver: str = "svd",
        rotation_kept: bool = True,
        restart_each_epoch: bool = False,
        proper_rotation: bool = False,
        recenter: bool = True,
        normalize: bool = True,
        translation: bool = True,
        confidence_weighting: bool = True,
        confidence_temperature: float = 1.0,
        similarity: Similarity = "cosine",
        collective: Collective | None = None,
    ) -> None:
        super().__init__()
        if rotation_interval < 1:
            raise ValueError(
                f"rotation_interval >= 1 must hold, but got rotation_interval={rotation_interval}"
            )
        check_solver(rotation_solver)
        if similarity not in SIMILARITIES:
            raise ValueError(
                f"similarity must be one of {list(SIMILARITIES)}, but got similarity={similarity!r}"
            )
        if not confidence_temperature > 0:
            raise ValueError(
                "confidence_temperature > 0 must hold, but got "
                f"confidence_temperature={confidence_temperature}"
            )
        self.rotation = rotation
        self.rotation_interval = rotation_interval
        self.rotation_solver = rotation_solver
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
        self.register_buffer("rotation_matrix", torch.eye(num_features) if rotation else None)
        self._num_steps = 0

    def get_extra_state(self) -> dict[str, int]:
        """Position within the rotation interval, for ``state_dict``."""
        return {"num_steps": self._num_steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Counterpart of :meth:`get_extra_state`."""
        self._num_steps = state["num_steps"]

    def begin_epoch(self) -> None:
        """Tell that an epoch starts: its first step refreshes R if `restart_each_epoch`."""
        if self.restart_each_epoch:
            self._num_steps = 0

    @torch.no_grad()
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
            Calibrated features without gradient, shape (K, D).
        """
        # Mixed precision is for the encoder: calibration is float32 at least.
        with torch.autocast(pretrained.device.type, enabled=False):
            dtype = torch.float64 if pretrained.dtype == torch.float64 else torch.float32
            rows = pretrained.detach().to(dtype), downstream.detach().to(dtype)
            return self._calibrate(*rows, labels, prototypes.detach().to(dtype), scale)

    def _calibrate(
        self,
        pretrained: Tensor,
        downstream: Tensor,
        labels: Tensor,
        prototypes: Tensor,
        scale: Tensor | float,
    ) -> Tensor:
        """Eq. 12 in the precision of the rows; shapes as for `forward`."""
        if self.normalize:
            pretrained, downstream = F.normalize(pretrained, dim=1), F.normalize(downstream, dim=1)
        calibrated = self._rotate(pretrained, downstream)
        if self.translation:
            weights = self._row_weights(downstream, labels, prototypes)
            calibrated = (
                calibrated
                + class_level_translation(calibrated, downstream, labels, weights, len(prototypes))[
                    labels
                ]
            )
        if self.normalize:
            calibrated = F.normalize(calibrated, dim=1) * scale
        return calibrated

    def _rotate(self, pretrained: Tensor, downstream: Tensor) -> Tensor:
        """R (v^p - mean v^p), plus the downstream mean where `recenter`; v^p where unrotated."""
        is_due = self._num_steps % self.rotation_interval == 0
        self._num_steps += 1
        if not self.rotation or not (is_due or self.rotation_kept):
            return pretrained
        if is_due:
            self._refresh(pretrained, downstream)
        rotation = self.rotation_matrix.to(pretrained.dtype)
        rotated = (pretrained - pretrained.mean(0)) @ rotation.T
        return rotated + downstream.mean(0) if self.recenter else rotated

    def _refresh(self, pretrained: Tensor, downstream: Tensor) -> None:
        if self.collective.rank == 0:
            self.rotation_matrix = global_rotation(
                pretrained, downstream, solver=self.rotation_solver, proper=self.proper_rotation
            )
        self.rotation_matrix = self.collective.broadcast(
            self.rotation_matrix.to(pretrained.dtype).contiguous()
        )

    def _row_weights(self, downstream: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
        if self.confidence_weighting:
            return confidence_guided_weights(
                downstream,
                labels,
                prototypes,
                temperature=self.confidence_temperature,
                similarity=self.similarity,
            )
        return 1.0 / torch.bincount(labels, minlength=len(prototypes))[labels].to(downstream)
