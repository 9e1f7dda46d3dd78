"""The objective of DR-Tune: cross-entropy of the batch plus distribution regularization (DR).

DR-Tune (https://arxiv.org/abs/2308.12058), eq. 5, 13 and 14.
Legend: B batch rows, K bank rows, C classes, D features; W processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drtune_ray.method.calibration import SemanticCalibration
from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.collective import Collective, OneProcess, own_block
from drtune_ray.method.diagnostics import agreement, sparse_class_share
from drtune_ray.method.feature_bank import FeatureBank
from drtune_ray.method.precision import at_least_float32

Reduction = Literal["sum", "mean"]
REDUCTIONS = get_args(Reduction)


@dataclass(frozen=True)
class MethodOutput:
    """What one step of a method gives.

    Attributes:
        loss: Scalar to call ``backward`` on. With W processes the *mean* over the processes of
            this loss and of its gradients equals those of one process.
        parts: The named parts of the loss, scalars without gradient, of this process's share:
            their mean over the processes is the global part.
        logits: Of the batch rows, shape (B, C).
        is_finite: Whether the loss and every feature so far were finite: a boolean scalar on the
            device, which nothing here waits for. False means that the training has diverged.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    logits: Tensor
    is_finite: Tensor


def combine(
    cross_entropy: Tensor, regularization: Tensor, weight: float, reduction: Reduction
) -> Tensor:
    """Eq. 14, ``CE + weight * DR`` (`sum`), or the authors' code's mean of both (`mean`).

    The authors' code takes one mean over the B + K rows, ``(CE + weight * DR) / (1 + weight)`` at
    ``weight = K/B``: the weight then also scales the step of the backbone.
    """
    total = cross_entropy + weight * regularization
    return total / (1.0 + weight) if reduction == "mean" else total


def row_share(loss_sum: Tensor, num_global_rows: int, world_size: int) -> Tensor:
    """A rank's part of a mean over all ranks' rows: ``W * sum / rows``.

    Averaging over the processes, as data-parallel training does to gradients, then yields the
    mean over the global rows, however unevenly these are divided.
    """
    return loss_sum * world_size / num_global_rows


def checked_shares(
    shares: Sequence[int] | None, num_rows: int, collective: Collective
) -> list[int]:
    """How many rows of the global batch each process has.

    Raises:
        ValueError: If several processes train and no shares are given, or they cannot be.
    """
    if shares is None:
        if collective.world_size > 1:
            raise ValueError(
                f"shares is needed with {collective.world_size} processes: pass how many rows of "
                "the global batch each of them has"
            )
        return [num_rows]
    if len(shares) != collective.world_size or shares[collective.rank] > num_rows:
        raise ValueError(
            f"shares must hold one number of rows for each of {collective.world_size} processes, "
            f"here at most {num_rows}, but got shares={list(shares)} in process {collective.rank}"
        )
    return list(shares)


class DRTune(nn.Module):
    """One training step of DR-Tune.

    Only `downstream_encoder` and `head` have a gradient and are needed after training. Each
    process holds the same bank in the same order: the new rows are gathered, and the work on the
    bank's rows is divided among the processes.

    Differs from the authors' code: see :class:`FeatureBank`,
    :class:`SemanticCalibration` and :func:`combine`; `regularization_weight` is a parameter of
    its own instead of following from the size of the bank.

    Args:
        downstream_encoder: Images to features (B, D); trained.
        head: Linear layer, (B, D) to (B, C); its weight rows are the class prototypes.
        bank: The feature bank.
        calibration: The semantic calibration; None leaves the pretrained rows as they are.
        pretrained_encoder: Frozen copy of the encoder before training; None where the caller
            always passes the pretrained features.
        regularization_weight: lambda of eq. 14, not negative.
        reduction: See :func:`combine`.
        collective: The other processes of the trial.

    Raises:
        ValueError: If `regularization_weight` is negative, `reduction` is unknown or both encoders
            are one module.
    """

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
        collective: Collective | None = None,
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
        self.collective = collective or OneProcess()

    def train(self, mode: bool = True) -> DRTune:
        """As ``nn.Module.train``; the frozen encoder stays in eval mode."""
        super().train(mode)
        if self.pretrained_encoder is not None:
            self.pretrained_encoder.eval()
        return self

    def begin_epoch(self) -> None:
        """Tell that an epoch starts."""
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
            shares: As for `forward`.
        """
        shares = checked_shares(shares, len(labels), self.collective)
        num_rows = shares[self.collective.rank]
        known = None if pretrained_features is None else pretrained_features[:num_rows]
        pretrained = self._pretrained(images[:num_rows], known)
        self._enqueue(pretrained, pretrained, labels[:num_rows], shares)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        pretrained_features: Tensor | None = None,
        shares: Sequence[int] | None = None,
    ) -> MethodOutput:
        """Loss of one step; afterwards the batch is in the bank.

        Args:
            images: Augmented images, (B, 3, H, W).
            labels: (B,).
            pretrained_features: z^p of the same augmented images, (B, D); without them the frozen
                encoder computes them.
            shares: How many rows of the global batch each process has, in the order of the ranks;
                needed with several processes. This one's leading rows count: there are more only
                where a process without rows of its own runs a spare row to keep its graph.

        Returns:
            The loss with parts ``cross_entropy`` and ``distribution_regularization``.
        """
        shares = checked_shares(shares, len(labels), self.collective)
        num_rows, num_global = shares[self.collective.rank], sum(shares)
        known = None if pretrained_features is None else pretrained_features[:num_rows]
        # First, so that what it needs is free again before the graph of the other encoder is held.
        pretrained = self._pretrained(images[:num_rows], known)
        features = self.downstream_encoder(images)
        logits = self.head(features)[:num_rows]
        labels, features = labels[:num_rows], features[:num_rows]
        cross_entropy = row_share(
            F.cross_entropy(at_least_float32(logits), labels, reduction="sum"),
            num_global,
            self.collective.world_size,
        )
        regularization = self._regularization(self._norm_sum(features) / num_global)
        self._enqueue(pretrained, features.detach(), labels, shares)
        loss = combine(cross_entropy, regularization, self.regularization_weight, self.reduction)
        return MethodOutput(
            loss,
            {
                "cross_entropy": cross_entropy.detach(),
                "distribution_regularization": regularization.detach(),
            },
            logits,
            loss.detach().isfinite() & (self.bank.num_nonfinite == 0),
        )

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor]:
        """What the bank tells of the training, as scalars; meant for an epoch's end.

        Returns:
            ``sparse_class_share``: classes with fewer than two bank rows. ``head_agreement``: bank
            rows for which the head names one class on (calibrated) pretrained and on downstream
            features. With a calibration: ``semantic_drift`` and ``semantic_drift_remaining``, the
            mean distance of the class centres of pretrained and downstream features before and
            after calibration (of unit-length features where it normalises), and, once R was
            solved, ``rotation_angle``, by which it turns the pretrained rows, in degrees. R is
            applied, also where ``rotation_kept`` is false. Empty for an empty bank.
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
        """The bank's rows with R as it is, (K, D), at the mean length of the downstream rows."""
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
    def _norm_sum(self, features: Tensor) -> Tensor:
        """Sum of the norms of the rows of the global batch, a scalar."""
        norms = torch.linalg.vector_norm(at_least_float32(features), dim=1)
        return self.collective.sum(norms.sum())

    def _regularization(self, scale: Tensor) -> Tensor:
        """Eq. 5 and 13: mean cross-entropy of the head on the calibrated bank; 0 if empty.

        Each process computes the part of its block of the bank's rows.
        """
        if len(self.bank) == 0:
            return self.head.weight.sum() * 0.0
        pretrained, downstream, labels = self.bank.stored()
        labels = labels.clone()  # part of the graph when the next rows are enqueued
        own = own_block(len(labels), self.collective)
        # Mixed precision is for the encoder: these products are small.
        with torch.autocast(labels.device.type, enabled=False):
            weight, bias = self._head_parameters()
            if self.calibration is None:
                rows = at_least_float32(pretrained[own].clone())
            else:
                rows = self.calibration(pretrained, downstream, labels, weight, scale)
            logits = F.linear(rows, weight, bias)
        loss_sum = F.cross_entropy(logits, labels[own], reduction="sum")
        return row_share(loss_sum, len(labels), self.collective.world_size)

    def _head_parameters(self) -> tuple[Tensor, Tensor | None]:
        bias: Tensor | None = self.head.bias
        return at_least_float32(self.head.weight), None if bias is None else at_least_float32(bias)

    @torch.no_grad()
    def _pretrained(self, images: Tensor, pretrained_features: Tensor | None) -> Tensor:
        if pretrained_features is not None:
            return pretrained_features
        if self.pretrained_encoder is None:
            raise ValueError("pretrained_features is needed where there is no pretrained_encoder")
        if len(images) == 0:
            return images.new_zeros(0, self.bank.pretrained.shape[1])
        features: Tensor = self.pretrained_encoder(images)
        return features

    def _enqueue(
        self, pretrained: Tensor, downstream: Tensor, labels: Tensor, shares: list[int]
    ) -> None:
        """Enter the rows of all processes, in the order of the ranks: one message."""
        pretrained, downstream = pretrained.to(self.bank.pretrained), downstream.to(pretrained)
        if self.collective.world_size > 1:
            skipped = _surplus(shares, self.bank.bank_size)
            kept = [share - skip for share, skip in zip(shares, skipped, strict=True)]
            # Labels travel as numbers of the same kind; float32 is exact up to 2^24 classes.
            message = torch.cat(
                [at_least_float32(rows) for rows in (pretrained, downstream, labels.unsqueeze(1))],
                dim=1,
            )[skipped[self.collective.rank] :]
            width = pretrained.shape[1]
            rows = self.collective.gather_rows(message, kept)
            pretrained, downstream, numbers = torch.split(rows, [width, width, 1], dim=1)
            labels = numbers.squeeze(1).long()
        self.bank.enqueue(pretrained, downstream, labels)


def _surplus(shares: Sequence[int], bank_size: int) -> list[int]:
    """How many of each process's first rows would be pushed out again by those behind them."""
    left, skipped = max(0, sum(shares) - bank_size), []
    for share in shares:
        skipped.append(min(share, left))
        left -= skipped[-1]
    return skipped
