"""Baselines of DR-Tune: methods with the same interface as ``DRTune``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from drtune_ray.method.collective import ALONE, Collective
from drtune_ray.method.dr_tune import MethodOutput
from drtune_ray.method.equations import cross_entropy


class CETuning(nn.Module):
    """Plain fine-tuning with cross-entropy: encoder and head, nothing else.

    The baseline "CE-tuning" of DR-Tune's Table 1 (https://arxiv.org/abs/2308.12058).

    Args:
        downstream_encoder: Images to features (B, D); trained.
        head: Linear layer, (B, D) to (B, C).
    """

    collective: Collective = ALONE

    def __init__(self, downstream_encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.downstream_encoder = downstream_encoder
        self.head = head

    def begin_epoch(self) -> None:
        """Start an epoch, on which nothing here depends."""

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        pretrained_features: Tensor | None = None,
        shares: Sequence[int] | None = None,
    ) -> MethodOutput:
        """Compute the loss of one step, its only part; arguments as for `DRTune`."""
        batch = self.collective.batch(len(labels), shares)
        logits = self.head(self.downstream_encoder(images))[batch.own]
        loss = cross_entropy(logits, labels[batch.own], batch.divisor)
        parts = {"cross_entropy": loss.detach()}
        return MethodOutput(loss, parts, logits, loss.detach().isfinite())

    def diagnostics(self) -> dict[str, Tensor]:
        """Return nothing: there is no bank."""
        return {}
