"""Stochastic depth and dropout of the trained encoder: whether a backbone has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.errors import ConfigError
from drtune_ray.training.backbones import Backbone

PROBED_RATE = 0.9
WHAT = {"drop_path": "stochastic depth", "dropout": "dropout before its classifier"}


def check_drops(config: BackboneConfig, backbone: Backbone) -> list[str]:
    """Return a sentence for each rate above 0 that does nothing to this backbone.

    Args:
        config: `drop_path` and `dropout`.
        backbone: Pretrained encoder.
    """
    return [
        f"backbone.{setting}={getattr(config, setting):g} has no effect on {backbone.name}, since "
        f"timm has no {what} for it: set backbone.{setting}=0 or choose another backbone"
        for setting, what in WHAT.items()
        if getattr(config, setting) and not _has_effect(config, backbone, setting)
    ]


def _has_effect(config: BackboneConfig, backbone: Backbone, setting: str) -> bool:
    """Whether the features of one image in train mode depend on the rate."""
    none = config.model_copy(update=dict.fromkeys(WHAT, 0.0))
    try:
        with_rate = backbone.build(none.model_copy(update={setting: PROBED_RATE}))
    except (TypeError, RuntimeError, ConfigError):  # an argument that the model does not know
        return False
    size = backbone.image_size
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return not torch.equal(_trained(with_rate, image), _trained(backbone.build(none), image))


@torch.inference_mode()
def _trained(encoder: nn.Module, image: Tensor) -> Tensor:
    """Features in train mode, but for BatchNorm, with draws from a fixed seed."""
    for parameter in encoder.parameters():
        if not parameter.any():  # such as the gain of a residual branch that was never trained
            parameter.fill_(0.5)
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features: Tensor = encoder(image)
    return features
