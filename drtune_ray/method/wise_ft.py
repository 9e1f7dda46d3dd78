"""WiSE-FT: weights between the pretrained and the fine-tuned ones.

Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022,
https://arxiv.org/abs/2109.01903.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from drtune_ray.method.probing import LPFT

COEFFICIENTS = tuple(1.0 - number / 10 for number in range(11))


class WiSEFT(LPFT):
    """WiSE-FT: (1 - a) theta_0 + a theta_1, with the coefficient a chosen on validation images.

    theta_1 are the fine-tuned encoder and head, theta_0 the pretrained encoder and the head that a
    linear probe found for it: an encoder without text has no zero-shot head, and the paper takes
    the probe's there too (appendix). Training is LP-FT; from its second part on, each validation
    compares a = 1, 0.9, ..., 0, of which the largest of equals is taken. The statistics of
    BatchNorm layers are interpolated as weights are.

    Args:
        downstream_encoder: Images to features (B, D); trained.
        head: Linear layer, (B, D) to (B, C); trained.
        pretrained_encoder: Copy of the encoder before training, with the same modules.
        options: See :class:`~drtune_ray.method.probing.LPFT`.
    """

    def __init__(
        self,
        downstream_encoder: nn.Module,
        head: nn.Linear,
        pretrained_encoder: nn.Module,
        **options: Any,
    ) -> None:
        super().__init__(downstream_encoder, head, pretrained_encoder=pretrained_encoder, **options)
        self.probed_head = copy.deepcopy(head).requires_grad_(False)
        # Modules that hold an interpolation, and are no part of the method.
        self._blends: list[nn.Module] = []

    def begin_epoch(self) -> None:
        """Count the epoch; at the end of probing, keep the head."""
        if self.is_probing:
            self.probed_head.load_state_dict(self.head.state_dict())
        super().begin_epoch()

    @property
    def num_candidates(self) -> int:
        """Number of coefficients that a validation compares."""
        has_probed = 0 < self.probe_epochs < self.num_epochs
        return len(COEFFICIENTS) if has_probed else 1

    def candidate(
        self, index: int, encoder: nn.Module, head: nn.Module
    ) -> tuple[nn.Module, nn.Module]:
        """Encoder and head at a coefficient; the same modules, overwritten by the next call."""
        if index == 0:
            return encoder, head
        assert self.pretrained_encoder is not None
        if not self._blends:
            with torch.inference_mode(False):
                self._blends = [copy.deepcopy(module) for module in (encoder, head)]
        starts, ends = (self.pretrained_encoder, self.probed_head), (encoder, head)
        for blend, start, end in zip(self._blends, starts, ends, strict=True):
            blend.load_state_dict(interpolated(start, end, COEFFICIENTS[index]))
            blend.eval()
        return self._blends[0], self._blends[1]

    def diagnostics(self) -> dict[str, Tensor]:
        """``coefficient``: a of the last validation."""
        return {"coefficient": torch.tensor(COEFFICIENTS[self.chosen])}


@torch.no_grad()
def interpolated(start: nn.Module, end: nn.Module, coefficient: float) -> dict[str, Tensor]:
    """(1 - a) start + a end, of all tensors of floating point; others are those of the end.

    Args:
        start: Module whose weights have the share 1 - a.
        end: Module whose weights have the share a.
        coefficient: a, from 0 to 1.
    """
    starts = start.state_dict()
    return {
        name: torch.lerp(starts[name], tensor, coefficient)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in end.state_dict().items()
    }
