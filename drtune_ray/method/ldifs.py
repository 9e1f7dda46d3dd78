"""LDIFS: the distance of features to the pretrained ones, in several layers.

Mukhoti, Gal, Torr, Dokania, "Fine-tuning can cripple your foundation model; preserving features may
be the solution", TMLR 2024, https://arxiv.org/abs/2308.13320.
Legend: B batch rows, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drtune_ray.method.base import CROSS_ENTROPY, Method
from drtune_ray.method.collective import Shard
from drtune_ray.method.precision import at_least_float32

NORM_FLOOR = 1e-10
POOLED = ""  # name of the encoder itself, whose output are the pooled features


class LDIFS(Method):
    """LDIFS: ``CE + lambda d``, where d is the distance to the pretrained features.

    d is the mean over images and layers of the mean squared difference of the features of a layer,
    which are L2-normalised over the channels at each place, as in LPIPS; the pooled features are a
    layer too. The frozen encoder runs at every step: features of inner layers are not prepared.
    Where images are mixed, d is that of the mixed ones, which are trained on.

    Args:
        downstream_encoder: Images to features (B, D); trained.
        head: Linear layer, (B, D) to (B, C).
        pretrained_encoder: Copy of the encoder before training, with the same modules.
        layers: Number of channels of each layer by the name of its module.
        weight: lambda, not negative.
        options: See :class:`~drtune_ray.method.base.Method`.
    """

    def __init__(
        self,
        downstream_encoder: nn.Module,
        head: nn.Linear,
        pretrained_encoder: nn.Module,
        *,
        layers: Mapping[str, int],
        weight: float = 10.0,
        **options: Any,
    ) -> None:
        super().__init__(downstream_encoder, head, pretrained_encoder, **options)
        self.layers = {**layers, POOLED: head.in_features}
        self.weight = weight
        self._distances: Tensor | None = None  # of the images of this step, (B,)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts of the loss."""
        return (CROSS_ENTROPY, "ldifs", *self.penalties)

    def features(self, images: Tensor, pretrained_features: Tensor | None) -> Tensor:
        """Features of images, (B, D); their distance is kept for :meth:`terms`."""
        assert self.pretrained_encoder is not None
        with torch.no_grad(), captured(self.pretrained_encoder, self.layers) as before:
            self.pretrained_encoder(images)
        with captured(self.downstream_encoder, self.layers) as now:
            features = super().features(images, pretrained_features)
        with torch.autocast(images.device.type, enabled=False):
            by_layer = [
                distance(now[name], before[name], width) for name, width in self.layers.items()
            ]
            self._distances = torch.stack(by_layer).mean(0)
        return features

    def terms(self, features: Tensor, labels: Tensor, batch: Shard) -> dict[str, Tensor]:
        """The distance of this process's rows."""
        distances, self._distances = self._distances, None
        assert distances is not None
        total = self.weight * distances[batch.own].sum() / batch.divisor
        return {"ldifs": total, **super().terms(features, labels, batch)}


def distance(now: Tensor, before: Tensor, width: int) -> Tensor:
    """Mean squared difference of features that are normalised over the channels, of each image.

    Args:
        now: Features of a layer, (B, ...), of which one dimension are the channels.
        before: The same of the pretrained encoder.
        width: Number of channels.

    Returns:
        Shape (B,).
    """
    axis = channel_axis(now, width)
    rows, others = (
        F.normalize(at_least_float32(features), dim=axis, eps=NORM_FLOOR)
        for features in (now, before)
    )
    return (rows - others).square().flatten(1).mean(1)


def channel_axis(features: Tensor, width: int) -> int:
    """Dimension of the channels: 1 in (B, C, H, W) and (B, C), the last in (B, L, C).

    Args:
        features: Features of a layer.
        width: Number of channels; of two dimensions with it, convolutions' order counts.

    Raises:
        ValueError: If no dimension has that width.
    """
    order = (1, -1) if features.ndim != 3 else (-1, 1)
    for axis in order:
        if features.ndim > 1 and features.shape[axis] == width:
            return axis
    raise ValueError(f"features of shape {tuple(features.shape)} have no {width} channels")


@contextmanager
def captured(encoder: nn.Module, names: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """Keep what modules return while the encoder runs, by their names."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            found[name] = output

        hooks.append(encoder.get_submodule(name).register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
