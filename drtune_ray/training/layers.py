"""Layers of a backbone, by timm's `group_matcher`: for their learning rates and for freezing."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from timm.models._manipulate import group_with_matcher
from timm.optim._param_groups import auto_group_layers
from torch import nn

from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.errors import ConfigError

_HEAD = "~head"  # no name of a parameter, and matched by no pattern of one


def layer_numbers(encoder: nn.Module, *, coarse: bool = False) -> dict[str, int]:
    """Return the layer of each parameter by its name, from 0 at the input.

    Args:
        encoder: A timm model without its classifier.
        coarse: Number the stages of a hierarchical backbone instead of their blocks.
    """
    return _numbered(encoder, coarse)[0]


def learning_rate_scales(encoder: nn.Module, decay: float) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter by its name.

    It is decay^(L - l) for layer l, with the head of the classifier as layer L
    (https://arxiv.org/abs/2106.08254, appendix; timm `param_groups_layer_decay`).

    Args:
        encoder: A timm model without its classifier.
        decay: Factor from each layer to the one before it, above 0 and at most 1.
    """
    if decay == 1.0:
        return {name: 1.0 for name, _ in encoder.named_parameters()}
    numbers, last = _numbered(encoder, coarse=False)
    return {name: decay ** (last - number) for name, number in numbers.items()}


def freeze(encoder: nn.Module, config: BackboneConfig) -> None:
    """Make the parameters of the first layers, and those of the patterns, keep their values.

    Args:
        encoder: A timm model without its classifier.
        config: Settings of the backbone.

    Raises:
        ConfigError: If a pattern fits none of its parameters.
    """
    layers, names = config.frozen_layers, [name for name, _ in encoder.named_parameters()]
    frozen = set(names) if layers == "all" else set()
    if isinstance(layers, int) and layers > 0:
        numbers = layer_numbers(encoder, coarse=True)
        frozen |= {name for name, number in numbers.items() if number < layers}
    for pattern in config.frozen_patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ConfigError(
                f"backbone.frozen_patterns has {pattern!r}, which fits no parameter of the "
                f"backbone; its parameters are {names[0]}, ..., {names[-1]}"
            )
        frozen |= found
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _numbered(encoder: nn.Module, coarse: bool) -> tuple[dict[str, int], int]:
    """Return the layer of each parameter, and that of the head of the classifier.

    Where timm names no layers (PiT, CAFormer) they are, as in timm, groups of twelve parameters.
    """
    matcher = getattr(encoder, "group_matcher", None)
    if matcher is None:
        numbers: dict[str, int] = auto_group_layers(encoder)  # type: ignore[no-untyped-call]
        return numbers, max(numbers.values()) + 1
    named: Any = [(name, None) for name, _ in encoder.named_parameters()]
    numbers = group_with_matcher(
        iter([*named, (_HEAD, None)]), matcher(coarse=coarse), reverse=True
    )
    return numbers, numbers.pop(_HEAD)
