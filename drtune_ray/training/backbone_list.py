"""The models of timm: how large they are, and whether their weights are at hand."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from drtune_ray.config.demo_weights import DEMO_BACKBONE, has_demo_weights
from drtune_ray.errors import ConfigError, first_line
from drtune_ray.training.backbones import is_cached


@dataclass(frozen=True)
class BackboneFacts:
    """A model of timm without its classifier, at the image size of its weights.

    Attributes:
        name: Name in timm.
        image_size: S, side of the images in pixels.
        num_parameters: Number of parameters.
        num_features: D, width of the features; None if the model does not pool them.
        gmacs: Multiplications with an addition for one image, in billions (10^9); None if they
            cannot be counted without weights.
        weights: Places of pretrained weights: tags in the hub's cache, ``demo``, ``hub``, or
            empty where timm has none.
        problem: Why it cannot be built; else empty.
    """

    name: str
    image_size: int
    num_parameters: int
    num_features: int | None
    gmacs: float | None
    weights: tuple[str, ...]
    problem: str = ""


def backbone_names(pattern: str | None) -> list[str]:
    """Return the names of timm's models that match a pattern with ``*``; all without one.

    Raises:
        ConfigError: If none matches.
    """
    names: list[str] = timm.list_models(pattern or "")
    if names:
        return names
    bare = str(pattern).strip("*")
    nearest = difflib.get_close_matches(bare, timm.list_models(), n=3, cutoff=0.5)
    hint = f"the nearest are {nearest}" if nearest else "try a shorter one, such as 'resnet*'"
    raise ConfigError(f"no model of timm {timm.__version__} matches {pattern!r}: {hint}")


def backbone_facts(name: str) -> BackboneFacts:
    """Build a model without memory for its weights, and count."""
    pretrained = timm.get_pretrained_cfg(name)
    size = pretrained.input_size[-1] if pretrained else 224
    weights = _weights(name)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoder = timm.create_model(name, num_classes=0).eval()
    except Exception as error:  # each model raises its own
        return BackboneFacts(name, size, 0, None, None, weights, first_line(error))
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            features = encoder(torch.zeros(1, 3, size, size, device="meta"))
    except Exception:  # a model whose computation depends on numbers
        width = int(getattr(encoder, "num_features", 0)) or None
        return BackboneFacts(name, size, num_parameters, width, None, weights)
    is_pooled = isinstance(features, torch.Tensor) and features.ndim == 2
    width = int(features.shape[1]) if is_pooled else None
    gmacs = counter.get_total_flops() / 2e9  # it counts a multiplication and an addition as two
    return BackboneFacts(name, size, num_parameters, width, gmacs, weights)


def _weights(name: str) -> tuple[str, ...]:
    tags = [timm.get_pretrained_cfg(full) for full in timm.list_pretrained(f"{name}.*")]
    known = [tag for tag in (*tags, timm.get_pretrained_cfg(name)) if tag is not None]
    cached = [tag.tag or name for tag in known if tag.hf_hub_id and is_cached(tag.hf_hub_id)]
    demo = ["demo"] if name == DEMO_BACKBONE and has_demo_weights() else []
    is_at_hub = any(tag.hf_hub_id or tag.url for tag in known)
    found = [*dict.fromkeys(cached), *demo]
    return tuple(found or (["hub"] if is_at_hub else []))
