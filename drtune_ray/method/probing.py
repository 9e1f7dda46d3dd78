"""LP-FT: linear probing, then fine-tuning.

Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
ICLR 2022, https://arxiv.org/abs/2202.10054.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from drtune_ray.method.base import Method


class LPFT(Method):
    """LP-FT: the head alone is trained in the first epochs, then encoder and head.

    Both parts minimise CE. In the first the encoder is frozen, in eval mode, and its features are
    z^p; the second starts from the head so found. Schedule and optimiser go on across both.

    Args:
        downstream_encoder: Images to features (B, D); trained.
        head: Linear layer, (B, D) to (B, C); trained.
        probe_epochs: Number of epochs of the first part, not negative.
        options: See :class:`~drtune_ray.method.base.Method`.
    """

    def __init__(
        self, downstream_encoder: nn.Module, head: nn.Linear, *, probe_epochs: int, **options: Any
    ) -> None:
        super().__init__(downstream_encoder, head, **options)
        self.probe_epochs, self.num_epochs = probe_epochs, 0

    @property
    def is_probing(self) -> bool:
        """Whether this is an epoch of the first part."""
        return self.num_epochs <= self.probe_epochs and self.probe_epochs > 0

    def begin_epoch(self) -> None:
        """Count the epoch."""
        self.num_epochs += 1

    def train(self, mode: bool = True) -> Self:
        """Set the mode as ``nn.Module.train`` does; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.is_probing:
            self.downstream_encoder.eval()
        return self

    def features(self, images: Tensor, pretrained_features: Tensor | None) -> Tensor:
        """Features of images, (B, D); while probing z^p where it is known, without gradient."""
        if not self.is_probing:
            return super().features(images, pretrained_features)
        if pretrained_features is not None and len(pretrained_features) == len(images):
            features = pretrained_features.to(self.head.weight.dtype)
        else:
            with torch.no_grad():
                features = super().features(images, pretrained_features)
        if self.collective.world_size > 1:  # all processes wait for a gradient of each parameter
            trained = (p for p in self.downstream_encoder.parameters() if p.requires_grad)
            features = features + 0.0 * sum(parameter.sum() for parameter in trained)
        return features

    def before_step(self) -> None:
        """Take the gradients of a frozen encoder away: optimisers leave such parameters alone."""
        if self.is_probing:
            for parameter in self.downstream_encoder.parameters():
                parameter.grad = None

    def get_extra_state(self) -> int:
        """Return the number of epochs begun, for ``state_dict``."""
        return self.num_epochs

    def set_extra_state(self, state: int) -> None:
        """Restore the number of epochs begun."""
        self.num_epochs = state
