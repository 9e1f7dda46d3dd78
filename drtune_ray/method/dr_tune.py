"""One training step of DR-Tune: cross-entropy of the batch plus distribution regularization.

DR-Tune (https://arxiv.org/abs/2308.12058), eq. 5, 13 and 14, by the functions of
:mod:`~drtune_ray.method.equations`.
Legend: B batch rows, K bank rows, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drtune_ray.method.calibration import SemanticCalibration
from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.collective import ALONE, Collective, Shard
from drtune_ray.method.diagnostics import agreement, sparse_class_share
from drtune_ray.method.equations import (
    REDUCTIONS,
    Reduction,
    cross_entropy,
    distribution_regularization,
    objective,
)
from drtune_ray.method.feature_bank import FeatureBank
from drtune_ray.method.precision import at_least_float32


@dataclass(frozen=True)
class MethodOutput:
    """Result of one step of a method.

    Attributes:
        loss: Scalar to call ``backward`` on. Where several processes train, the *mean* of their
            losses and gradients is that of one process.
        parts: Named parts of the loss, scalars without gradient.
        logits: Logits of the batch rows, shape (B, C).
        is_finite: Whether the loss and every feature so far were finite: a boolean scalar on the
            device, which nothing here waits for. False means that the training has diverged.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    logits: Tensor
    is_finite: Tensor


class DRTune(nn.Module):
    """One training step of DR-Tune (eq. 14).

    Only `downstream_encoder` and `head` have a gradient and are needed after training. A trainer
    of several processes sets `collective` on the finished module.

    Differs from the authors' code: see :class:`FeatureBank`, :class:`SemanticCalibration` and
    :func:`~drtune_ray.method.equations.objective`; `regularization_weight` is a parameter of its
    own instead of following from the size of the bank.

    Args:
        downstream_encoder: Images to features (B, D); trained.
        head: Linear layer, (B, D) to (B, C); its weight rows are the class prototypes.
        bank: The feature bank.
        calibration: The semantic calibration; None leaves the pretrained rows as they are.
        pretrained_encoder: Frozen copy of the encoder before training; None where the caller
            always passes the pretrained features.
        regularization_weight: lambda of eq. 14, not negative.
        reduction: ``sum`` (eq. 14) or ``mean`` (the authors' code).

    Raises:
        ValueError: If `regularization_weight` is negative, `reduction` is unknown or both encoders
            are one module.
    """

    collective: Collective = ALONE

    def __init__(
        self,
        downstream_encoder: nn.Module,
        head: nn.Linear,
        bank: FeatureBank,
        calibration: SemanticCalibration | None = None,
        pretrained_encoder: nn.Module | None = None,
        *,
        regularization_weight: float = 1.0,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        if not regularization_weight >= 0:
            raise ValueError(
                "regularization_weight >= 0 must hold, but got "
                f"regularization_weight={regularization_weight}"
            )
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction must be one of {list(REDUCTIONS)}, but got reduction={reduction!r}"
            )
        if pretrained_encoder is downstream_encoder:
            raise ValueError(
                "pretrained_encoder must be another module than downstream_encoder, since it is "
                "frozen: pass copy.deepcopy(encoder)"
            )
        self.downstream_encoder = downstream_encoder
        self.head = head
        self.bank = bank
        self.calibration = calibration
        self.pretrained_encoder = pretrained_encoder
        if pretrained_encoder is not None:
            pretrained_encoder.requires_grad_(False).eval()
        self.regularization_weight = regularization_weight
        self.reduction: Reduction = reduction

    def train(self, mode: bool = True) -> DRTune:
        """Set the mode as ``nn.Module.train`` does; the frozen encoder stays in eval mode."""
        super().train(mode)
        if self.pretrained_encoder is not None:
            self.pretrained_encoder.eval()
        return self

    def begin_epoch(self) -> None:
        """Start an epoch."""
        if self.calibration is not None:
            self.calibration.begin_epoch()

    @torch.no_grad()
    def warm_up_bank(
        self,
        images: Tensor,
        labels: Tensor,
        pretrained_features: Tensor | None = None,
        shares: Sequence[int] | None = None,
    ) -> None:
        """Fill the bank before the first epoch: z^p enters both banks.

        Args:
            images: (B, 3, H, W); not read where `pretrained_features` is given.
            labels: (B,).
            pretrained_features: z^p of the images, (B, D), where they are known already.
            shares: See :meth:`forward`.
        """
        batch = self.collective.batch(len(labels), shares)
        pretrained = self._pretrained(images, pretrained_features, batch)
        self._enqueue(pretrained, pretrained, labels[batch.own], batch)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        pretrained_features: Tensor | None = None,
        shares: Sequence[int] | None = None,
    ) -> MethodOutput:
        """Compute the loss of one step; afterwards the batch is in the bank.

        Args:
            images: Augmented images, (B, 3, H, W).
            labels: (B,).
            pretrained_features: z^p of the same augmented images, (B, D); without them the frozen
                encoder computes them.
            shares: Number of rows of each process; see
                :meth:`~drtune_ray.method.collective.Collective.batch`.

        Returns:
            The loss with parts ``cross_entropy`` and ``distribution_regularization``.
        """
        batch = self.collective.batch(len(labels), shares)
        # First, so that what it needs is free again before the graph of the other encoder is held.
        pretrained = self._pretrained(images, pretrained_features, batch)
        features = self.downstream_encoder(images)
        logits = self.head(features)[batch.own]
        labels, features = labels[batch.own], features[batch.own].detach()
        batch_loss = cross_entropy(logits, labels, batch.divisor)
        bank_loss = self._regularization(self._mean_norm(features, batch))
        self._enqueue(pretrained, features, labels, batch)
        loss = objective(batch_loss, bank_loss, self.regularization_weight, self.reduction)
        return MethodOutput(
            loss,
            {
                "cross_entropy": batch_loss.detach(),
                "distribution_regularization": bank_loss.detach(),
            },
            logits,
            loss.detach().isfinite() & (self.bank.num_nonfinite == 0),
        )

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars that describe the training by the bank as it is; for the end of an epoch.

        Returns:
            ``sparse_class_share``: share of the classes with fewer than two bank rows.
            ``head_agreement``: share of the bank rows for which the head predicts the same class
            from (calibrated) pretrained and from downstream features. With a calibration also
            ``semantic_drift`` and ``semantic_drift_remaining``: mean distance of the class centres
            of pretrained and downstream features before and after calibration (unit-length
            features where it normalises), and, once R was solved, ``rotation_angle``: angle by
            which R turns the pretrained rows, in degrees. R is applied even where
            ``rotation_kept`` is false. Empty for an empty bank.
        """
        if len(self.bank) == 0:
            return {}
        pretrained, downstream, labels = self.bank.stored()
        pretrained, downstream = at_least_float32(pretrained), at_least_float32(downstream)
        weight, bias = self._head_parameters()
        classes = ClassRows(labels, len(weight))
        rows, found = pretrained, {"sparse_class_share": sparse_class_share(classes)}
        with torch.autocast(labels.device.type, enabled=False):
            if self.calibration is not None:
                rows = self._calibrated(pretrained, downstream, labels)
                found |= self.calibration.diagnostics(pretrained, downstream, rows, classes)
            found["head_agreement"] = agreement(
                F.linear(rows, weight, bias), F.linear(downstream, weight, bias)
            )
        return found

    def _calibrated(self, pretrained: Tensor, downstream: Tensor, labels: Tensor) -> Tensor:
        """Calibrate all rows with R as it is, (K, D), to the mean norm of the downstream rows."""
        assert self.calibration is not None
        return self.calibration.calibrated(
            pretrained,
            downstream,
            labels,
            self.head.weight,
            torch.linalg.vector_norm(downstream, dim=1).mean(),
            rotates=self.calibration.applied_rotation is not None,
        )

    @torch.no_grad()
    def _mean_norm(self, features: Tensor, batch: Shard) -> Tensor:
        """Mean norm of the downstream features of the global batch, a scalar."""
        norms = torch.linalg.vector_norm(at_least_float32(features), dim=1)
        return self.collective.sum(norms.sum()) / batch.num_rows

    def _regularization(self, scale: Tensor) -> Tensor:
        """DR of the calibrated bank (eq. 5, 13); 0 if it is empty."""
        if len(self.bank) == 0:
            return self.head.weight.sum() * 0.0
        pretrained, downstream, labels = self.bank.stored()
        labels = labels.clone()  # part of the graph when the next rows are enqueued
        block = self.collective.block(len(labels))
        # Mixed precision is for the encoder: these products are small.
        with torch.autocast(labels.device.type, enabled=False):
            weight, bias = self._head_parameters()
            if self.calibration is None:
                rows = at_least_float32(pretrained[block.own].clone())
            else:
                rows = self.calibration(
                    pretrained, downstream, labels, weight, scale, self.collective
                )
            return distribution_regularization(rows, labels[block.own], weight, bias, block.divisor)

    def _head_parameters(self) -> tuple[Tensor, Tensor | None]:
        bias: Tensor | None = self.head.bias
        return at_least_float32(self.head.weight), None if bias is None else at_least_float32(bias)

    @torch.no_grad()
    def _pretrained(self, images: Tensor, known: Tensor | None, batch: Shard) -> Tensor:
        """z^p of the images, (B, D), computed where it is not known."""
        if known is not None:
            return known[batch.own]
        if self.pretrained_encoder is None:
            raise ValueError("pretrained_features is needed where there is no pretrained_encoder")
        images = images[batch.own]
        if len(images) == 0:
            return images.new_zeros(0, self.bank.pretrained.shape[1])
        features: Tensor = self.pretrained_encoder(images)
        return features

    def _enqueue(
        self, pretrained: Tensor, downstream: Tensor, labels: Tensor, batch: Shard
    ) -> None:
        """Enter the global batch into the bank."""
        pretrained, downstream = pretrained.to(self.bank.pretrained), downstream.to(pretrained)
        rows = self.collective.gathered_batch(
            pretrained, downstream, labels, batch, self.bank.bank_size
        )
        self.bank.enqueue(*rows)
