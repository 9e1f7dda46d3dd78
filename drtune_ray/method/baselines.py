"""What DR-Tune is compared with: methods with the same interface as ``DRTune``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from drtune_ray.method.collective import Collective, OneProcess
from drtune_ray.method.objective import MethodOutput, checked_shares, row_share
from drtune_ray.method.precision import at_least_float32


class CETuning(nn.Module):
    """Plain fine-tuning with cross-entropy: encoder and head, nothing else.

    The baseline "CE-tuning" of DR-Tune's Table 1 (https://arxiv.org/abs/2308.12058).

    Args:
        downstream_encoder: Images to features (B, D); trained.
        head: Linear layer, (B, D) to (B, C).
        collective: The other processes of the trial.
    """

    def __init__(
        self,
        downstream_encoder: nn.Module,
        head: nn.Linear,
        *,
        collective: Collective | None = None,
    ) -> None:
        super().__init__()
        self.downstream_encoder = downstream_encoder
        self.head = head
        self.collective = collective or OneProcess()

    def begin_epoch(self) -> None:
        """Nothing depends on the epoch."""

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        pretrained_features: Tensor | None = None,
        shares: Sequence[int] | None = None,
    ) -> MethodOutput:
        """Loss of one step, with the part ``cross_entropy``; arguments as for ``DRTune``."""
        shares = checked_shares(shares, len(labels), self.collective)
        num_rows = shares[self.collective.rank]
        logits = self.head(self.downstream_encoder(images))[:num_rows]
        loss_sum = F.cross_entropy(at_least_float32(logits), labels[:num_rows], reduction="sum")
        loss = row_share(loss_sum, sum(shares), self.collective.world_size)
        parts = {"cross_entropy": loss.detach()}
        return MethodOutput(loss, parts, logits, loss.detach().isfinite())

    def diagnostics(self) -> dict[str, Tensor]:
        """Nothing: there is no bank."""
        return {}
