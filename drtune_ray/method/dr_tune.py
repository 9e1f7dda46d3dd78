"""One training step of DR-Tune: cross-entropy of the batch plus distribution regularization.

DR-Tune (https://arxiv.org/abs/2308.12058), eq. 5, 13 and 14, by the functions of
:mod:`~drtune_ray.method.equations`.
Legend: B batch rows, K bank rows, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drtune_ray.method.base import CROSS_ENTROPY, Method, MethodOutput, MixedBatch, Penalty
from drtune_ray.method.calibration import SemanticCalibration
from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.collective import MicroBatch, Shard
from drtune_ray.method.diagnostics import (
    DR_GRADIENT_SHARE,
    agreement,
    head_gradient_share,
    sparse_class_share,
)
from drtune_ray.method.equations import (
    REDUCTIONS,
    Reduction,
    distribution_regularization,
    objective,
)
from drtune_ray.method.feature_bank import FeatureBank
from drtune_ray.method.precision import at_least_float32

DISTRIBUTION_REGULARIZATION = "distribution_regularization"


class DRTune(Method):
    """One training step of DR-Tune (eq. 14).

    Only `downstream_encoder` and `head` have a gradient and are needed after training. The batch
    enters the bank with its step, or where `enqueues` is False with :meth:`after_step`.

    Gradients of a batch can be accumulated over parts of it (:class:`MicroBatch`). The sum of their
    losses and gradients is that of the whole batch: each part contributes its rows' cross-entropy,
    and the last one the regularization, which needs the mean norm of all rows; then all enter the
    bank.

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
        label_smoothing: Label smoothing of the batch's cross-entropy. DR keeps the labels (eq. 5).
        class_weights: Weights of the classes in both parts of the loss, (C,); 1 by default.
        penalties: Terms that are added to the loss; see :class:`~drtune_ray.method.base.Penalty`.

    Raises:
        ValueError: If `regularization_weight` is negative, `reduction` is unknown or both encoders
            are one module.
    """

    needs_pretrained_features = True

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
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        penalties: Sequence[Penalty] = (),
    ) -> None:
        if not regularization_weight >= 0:
            raise ValueError(
                "regularization_weight >= 0 must hold, but got "
                f"regularization_weight={regularization_weight}"
            )
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction must be one of {list(REDUCTIONS)}, but got reduction={reduction!r}"
            )
        super().__init__(
            downstream_encoder,
            head,
            pretrained_encoder,
            penalties=penalties,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
        )
        self.bank = bank
        self.calibration = calibration
        self.regularization_weight = regularization_weight
        self.reduction: Reduction = reduction
        # Of the parts of a batch so far: their rows in all processes, and the sums of their norms.
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._norms: list[Tensor] = []

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts of the loss, in the order in which :meth:`forward` returns them."""
        return (CROSS_ENTROPY, DISTRIBUTION_REGULARIZATION, *self.penalties)

    @property
    def num_warm_up_rows(self) -> int:
        """K, the number of rows that fill the bank."""
        return self.bank.bank_size

    def begin_epoch(self) -> None:
        """Start an epoch."""
        if self.calibration is not None:
            self.calibration.begin_epoch()

    @torch.no_grad()
    def warm_up(
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
        self._gather(pretrained, pretrained, labels[batch.own], batch)
        self.enqueue_batch()

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        pretrained_features: Tensor | None = None,
        shares: Sequence[int] | None = None,
        micro: MicroBatch | None = None,
        mixed: MixedBatch | None = None,
    ) -> MethodOutput:
        """Compute the loss of one step; afterwards the batch is in the bank.

        Where images are mixed, the cross-entropy alone is that of the mixed ones. A row of the bank
        needs one class (eq. 8 to 13) and z^p of the same image, so that bank, calibration and DR
        take the images as they were before: a forward pass without gradient more.

        Args:
            images: Augmented images, (B, 3, H, W).
            labels: (B,).
            pretrained_features: z^p of the same augmented images, (B, D); without them the frozen
                encoder computes them.
            shares: Number of rows of each process; see
                :meth:`~drtune_ray.method.collective.Collective.batch`.
            micro: Place of these images in their batch, if they are a part of it.
            mixed: The same images mixed; see above.

        Returns:
            The loss with parts ``cross_entropy``, ``distribution_regularization`` and those of
            the penalties.
        """
        batch = self.collective.batch(len(labels), shares, micro)
        # First, so that what it needs is free again before the graph of the other encoder is held.
        pretrained = self._pretrained(images, pretrained_features, batch)
        unmixed = None if mixed is None else self._unmixed(images)
        images, targets = (images, labels) if mixed is None else mixed
        trained = self.downstream_encoder(images)
        logits = self.head(trained)[batch.own]
        features = (trained if unmixed is None else unmixed)[batch.own].detach()
        labels = labels[batch.own]
        batch_loss = self.cross_entropy(logits, targets[batch.own], batch)
        scale = self._mean_norm(features, batch)
        bank_loss = batch_loss.new_zeros(()) if scale is None else self._regularization(scale)
        self._gather(pretrained, features, labels, batch)
        if batch.is_last and self.enqueues:
            self.enqueue_batch()
        is_finite = self.bank.num_nonfinite == 0
        for held_back, downstream, _ in self._rows:
            is_finite = is_finite & held_back.isfinite().all() & downstream.isfinite().all()
        loss = objective(batch_loss, bank_loss, self.regularization_weight, self.reduction)
        parts = {
            CROSS_ENTROPY: batch_loss.detach(),
            DISTRIBUTION_REGULARIZATION: bank_loss.detach(),
        }
        for name, term in self.terms(trained[batch.own], labels, batch).items():
            loss = loss + term
            parts[name] = term.detach()
        return MethodOutput(loss, parts, logits, loss.detach().isfinite() & is_finite)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars that describe the training by the bank as it is; for the end of an epoch.

        Returns:
            ``bank_rows``: number of filled rows, the only one for an empty bank.
            ``sparse_class_share``: share of the classes with fewer than two bank rows.
            ``head_agreement``: share of the bank rows for which the head predicts the same class
            from (calibrated) pretrained and from downstream features. ``dr_gradient_share``: share
            of DR in the head's gradient, see :func:`head_gradient_share`. With a calibration also
            ``semantic_drift`` and ``semantic_drift_remaining``: mean distance of the class centres
            of pretrained and downstream features before and after calibration (unit-length
            features where it normalises), and, once R was solved, ``rotation_angle``: angle by
            which R turns the pretrained rows, in degrees. R is applied even where
            ``rotation_kept`` is false.
        """
        rows_filled = torch.tensor(float(len(self.bank)))
        if len(self.bank) == 0:
            return {"bank_rows": rows_filled}
        pretrained, downstream, labels = self.bank.stored()
        pretrained, downstream = at_least_float32(pretrained), at_least_float32(downstream)
        weight, bias = self._head_parameters()
        classes = ClassRows(labels, len(weight))
        rows = pretrained
        found = {"bank_rows": rows_filled, "sparse_class_share": sparse_class_share(classes)}
        with torch.autocast(labels.device.type, enabled=False):
            if self.calibration is not None:
                rows = self._calibrated(pretrained, downstream, labels)
                found |= self.calibration.diagnostics(pretrained, downstream, rows, classes)
            found["head_agreement"] = agreement(
                F.linear(rows, weight, bias), F.linear(downstream, weight, bias)
            )
            found[DR_GRADIENT_SHARE] = head_gradient_share(
                downstream,
                rows,
                labels,
                weight,
                bias,
                self.regularization_weight,
                self.class_weights,
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
    def _mean_norm(self, features: Tensor, batch: Shard) -> Tensor | None:
        """Mean norm of the downstream features of the global batch; None before its last part."""
        norms = torch.linalg.vector_norm(at_least_float32(features), dim=1).sum()
        if not batch.is_last:
            self._norms.append(norms)
            return None
        earlier, self._norms = self._norms, []
        return self.collective.sum(sum(earlier, norms)) / batch.num_rows

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
            return distribution_regularization(
                rows,
                labels[block.own],
                weight,
                bias,
                block.divisor,
                class_weights=self.class_weights,
            )

    def _head_parameters(self) -> tuple[Tensor, Tensor | None]:
        bias: Tensor | None = self.head.bias
        return at_least_float32(self.head.weight), None if bias is None else at_least_float32(bias)

    @torch.no_grad()
    def _unmixed(self, images: Tensor) -> Tensor:
        """z^d of the images, (B, D), for the bank alone."""
        features: Tensor = self.downstream_encoder(images)
        return features

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

    def _gather(self, pretrained: Tensor, downstream: Tensor, labels: Tensor, batch: Shard) -> None:
        """Keep rows of the global batch, or of a part of it, for the bank."""
        pretrained, downstream = pretrained.to(self.bank.pretrained), downstream.to(pretrained)
        rows = self.collective.gathered_batch(
            pretrained, downstream, labels, batch, self.bank.bank_size
        )
        self._rows.append(rows)

    def after_step(self, is_taken: bool) -> None:
        """Enter the last batch into the bank, or forget it if its update was skipped."""
        self.enqueue_batch() if is_taken else self.drop_batch()

    def enqueue_batch(self) -> None:
        """Enter the rows of the last batch into the bank."""
        rows, self._rows = self._rows, []
        if len(rows) == 1:
            self.bank.enqueue(*rows[0])
        elif rows:
            self.bank.enqueue(*map(torch.cat, zip(*rows, strict=True)))

    def drop_batch(self) -> None:
        """Forget the rows of the last batch, whose update was skipped."""
        self._rows = []
