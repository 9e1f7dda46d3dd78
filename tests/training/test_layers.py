"""Learning rates of each layer, against the definition and against timm's own groups."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from drtune_ray.config.training import OptimConfig
from drtune_ray.training.layers import layer_numbers, learning_rate_scales
from drtune_ray.training.optim import build_optimizer

DECAY, RATE, HEAD = 0.7, 0.01, 5.0


def encoder(name: str, num_classes: int = 0) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=num_classes)


def rates_by_name(name: str, optimizer: Any) -> dict[str, float]:
    """Learning rate of each parameter in the optimiser."""
    body, top = encoder(name), nn.Linear(4, 3)
    config = OptimConfig(name=optimizer, backbone_lr=RATE, layer_decay=DECAY)
    built = build_optimizer(body, top, config, HEAD)
    rates = {id(p): g["lr"] for g in built.param_groups for p in g["params"]}
    named = [*body.named_parameters(), *((f"head.{k}", p) for k, p in top.named_parameters())]
    assert len(rates) == len(named)
    return {key: rates[id(p)] for key, p in named}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_the_rate_of_each_layer_is_a_power_of_the_decay(optimizer: str) -> None:
    """Embeddings are layer 0 and block b is layer b + 1; the head is the last, layer depth + 1."""
    found = rates_by_name("test_vit", optimizer)
    depth = len(encoder("test_vit").blocks)  # type: ignore[arg-type]
    for name, rate in found.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        if name.startswith("head."):
            wanted = RATE * HEAD
        elif name.startswith("norm."):  # belongs to the last block
            wanted = RATE * DECAY
        else:
            layer = int(block[1]) + 1 if block else 0
            wanted = RATE * DECAY ** (depth + 1 - layer)
        assert rate == pytest.approx(wanted, rel=1e-12), name


FAMILIES = (
    *("test_vit", "test_efficientnet", "resnet18", "convnext_atto", "test_nfnet", "regnety_002"),
    *("swin_tiny_patch4_window7_224", "mixer_s32_224", "eva02_tiny_patch14_224", "test_byobnet"),
    # Without named layers.
    *("pit_ti_224", "caformer_s18"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rates_are_those_of_timm_for_the_whole_classifier(name: str) -> None:
    whole = encoder(name, num_classes=3)
    scales = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(whole, layer_decay=DECAY)
        for parameter in group["params"]
    }
    wanted = {key: scales[id(parameter)] for key, parameter in whole.named_parameters()}
    found = learning_rate_scales(encoder(name), DECAY)
    assert found and found == {key: wanted[key] for key in found}
    assert len(set(found.values())) > 2


def test_without_a_decay_nothing_depends_on_the_layers() -> None:
    assert set(learning_rate_scales(nn.Linear(2, 2), 1.0).values()) == {1.0}


def test_stages_are_coarser_than_blocks() -> None:
    fine, coarse = (layer_numbers(encoder("resnet18"), coarse=c) for c in (False, True))
    assert set(coarse.values()) == set(range(5)) and set(fine.values()) == set(range(9))
    for name, stage in coarse.items():
        assert stage == (int(name[5]) if name.startswith("layer") else 0)
