"""Exponential moving average of the trained weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """Average a of the weights w: a = w after the first step, then a = d a + (1 - d) w.

    Buffers, such as the statistics of BatchNorm, are the latest ones.

    Args:
        encoder: The trained encoder.
        head: The trained head.
        decay: d, above 0 and below 1.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, decay: float) -> None:
        self._trained = nn.ModuleDict({"encoder": encoder, "head": head})
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._average = AveragedModel(self._trained, multi_avg_fn=average)
        self._average.requires_grad_(False).eval()

    @property
    def encoder(self) -> nn.Module:
        """Encoder with the averaged weights, in eval mode."""
        return self._part("encoder")

    @property
    def head(self) -> nn.Module:
        """Head with the averaged weights."""
        return self._part("head")

    def update(self) -> None:
        """Include the weights as they are, after a step."""
        self._average.update_parameters(self._trained)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of steps."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._average.load_state_dict(state)

    def _part(self, name: str) -> nn.Module:
        return self._average.module.get_submodule(name)
