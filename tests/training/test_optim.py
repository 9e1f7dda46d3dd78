from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.optim import SGD, AdamW

from drtune_ray.config.training import OptimConfig
from drtune_ray.training.optim import build_optimizer, learning_rates
from drtune_ray.training.schedules import build_schedule

NUM_EPOCHS, STEPS = 4, 5


def encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))


def head() -> nn.Module:
    return nn.Linear(4, 2)


def rates_by_step(num_steps: int, **values: Any) -> list[dict[str, float]]:
    config = OptimConfig(backbone_lr=0.1, **values)
    optimizer = build_optimizer(encoder(), head(), config, 10.0)
    schedule = build_schedule(optimizer, config, NUM_EPOCHS, STEPS)
    found = []
    for _ in range(num_steps):
        found.append(learning_rates(optimizer))
        optimizer.step()
        schedule.step()
    return found


# ---- groups


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("multiplier", [1.0, 10.0, 0.5])
def test_build_optimizer__head_multiplier(name: Any, multiplier: float) -> None:
    config = OptimConfig(name=name, backbone_lr=0.02)
    optimizer = build_optimizer(encoder(), head(), config, multiplier)
    assert learning_rates(optimizer) == {"backbone": 0.02, "head": 0.02 * multiplier}
    assert {group["lr"] for group in optimizer.param_groups} == {0.02, 0.02 * multiplier}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_build_optimizer__every_parameter_once(name: Any) -> None:
    body, top = encoder(), head()
    optimizer = build_optimizer(body, top, OptimConfig(name=name), 2.0)
    found = {"backbone": set(), "head": set()}  # type: dict[str, set[int]]
    for group in optimizer.param_groups:
        ids = {id(parameter) for parameter in group["params"]}
        assert len(ids) == len(group["params"])
        assert not ids & found[group["name"]]
        found[group["name"]] |= ids
    assert found["backbone"] == {id(parameter) for parameter in body.parameters()}
    assert found["head"] == {id(parameter) for parameter in top.parameters()}


def test_build_optimizer__sgd_as_in_the_paper() -> None:
    config = OptimConfig(weight_decay=0.3, momentum=0.8, nesterov=True)
    optimizer = build_optimizer(encoder(), head(), config, 2.0)
    assert type(optimizer) is SGD
    assert [group["name"] for group in optimizer.param_groups] == ["backbone", "head"]
    for group in optimizer.param_groups:  # biases and normalisation decay too
        assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (0.3, 0.8, True)


def test_build_optimizer__adamw_spares_biases_and_normalisation() -> None:
    body, top = encoder(), head()
    optimizer = build_optimizer(body, top, OptimConfig(name="adamw", weight_decay=0.3), 2.0)
    assert type(optimizer) is AdamW
    decays = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for module in (body, top):
        for name, parameter in module.named_parameters():
            is_matrix = name in ("0.weight", "3.weight", "weight")
            assert decays[id(parameter)] == (0.3 if is_matrix else 0.0), name
    assert sorted(decays.values()) == [0.0] * 5 + [0.3] * 3


class Patterned(nn.Module):
    """Names what does not decay by a pattern, as XCiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed, self.pos_embedder = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed.*", "absent"}


TABLES = "layers.{}.blocks.{}.attn.relative_position_bias_table"
SPARED = {
    "test_vit": {"pos_embed", "cls_token"},
    "swin_tiny_patch4_window7_224": {
        TABLES.format(stage, block)
        for stage, depth in enumerate((2, 2, 6, 2))
        for block in range(depth)
    },
    "patterned": {"pos_embed.weight"},
    "test_efficientnet": set(),
}


@pytest.mark.parametrize("name", SPARED)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_build_optimizer__adamw_spares_what_the_encoder_names(name: str, optimizer: Any) -> None:
    with torch.device("meta"):
        body = Patterned() if name == "patterned" else timm.create_model(name, num_classes=0)
    config = OptimConfig(name=optimizer, weight_decay=0.3)
    built = build_optimizer(body, nn.Linear(4, 2), config, 1.0)
    decays = {id(p): g["weight_decay"] for g in built.param_groups for p in g["params"]}
    spared = {key for key, p in body.named_parameters() if p.ndim > 1 and decays[id(p)] == 0.0}
    assert spared == (SPARED[name] if optimizer == "adamw" else set())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_build_optimizer__frozen_parameters_are_left_out(name: Any) -> None:
    body, top = encoder(), head()
    for parameter in body[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    optimizer = build_optimizer(body, top, OptimConfig(name=name), 1.0)
    used = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not used & {id(parameter) for parameter in body[0].parameters()}  # type: ignore[index]
    assert len(used) == 6


def test_build_optimizer__one_step_moves_the_head_by_its_multiple() -> None:
    body, top = encoder(), head()
    config = OptimConfig(backbone_lr=0.1, weight_decay=0.0, momentum=0.0)
    optimizer = build_optimizer(body, top, config, 7.0)
    before = [parameter.detach().clone() for parameter in (*body.parameters(), *top.parameters())]
    for parameter in (*body.parameters(), *top.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = zip(before, (*body.parameters(), *top.parameters()), strict=True)
    steps = [float((old - new.detach()).mean()) for old, new in moved]
    assert steps == pytest.approx([0.1] * 6 + [0.7] * 2, rel=1e-4)


# ---- schedules


def test_build_schedule__cosine_falls_at_every_step() -> None:
    rates = rates_by_step(NUM_EPOCHS * STEPS + 3, schedule="cosine")
    for step, rate in enumerate(rates):
        done = min(step / 20, 1.0)
        factor = 0.5 * (1.0 + math.cos(math.pi * done))
        assert rate["backbone"] == pytest.approx(0.1 * factor, abs=1e-12)
        assert rate["head"] == pytest.approx(1.0 * factor, abs=1e-12)
    assert rates[0]["backbone"] == 0.1
    assert rates[10]["backbone"] == pytest.approx(0.05)
    assert rates[20]["backbone"] == rates[22]["backbone"] == 0.0


def test_build_schedule__cosine_per_epoch_falls_between_epochs_only() -> None:
    rates = [rate["backbone"] for rate in rates_by_step(20, schedule="cosine_per_epoch")]
    root = math.sqrt(0.5)
    expected = [0.1, 0.05 * (1 + root), 0.05, 0.05 * (1 - root)]
    for epoch, value in enumerate(expected):
        assert rates[epoch * STEPS : (epoch + 1) * STEPS] == pytest.approx([value] * STEPS)


def test_build_schedule__constant() -> None:
    assert rates_by_step(25, schedule="constant") == [{"backbone": 0.1, "head": 1.0}] * 25


@pytest.mark.parametrize("schedule", ["cosine", "cosine_per_epoch", "constant"])
def test_build_schedule__goes_on_from_its_state(schedule: Any) -> None:
    unbroken = rates_by_step(12, schedule=schedule)
    config = OptimConfig(backbone_lr=0.1, schedule=schedule)
    parts = []
    state: Any = None
    for num_steps in (7, 5):
        optimizer = build_optimizer(encoder(), head(), config, 10.0)
        progress = build_schedule(optimizer, config, NUM_EPOCHS, STEPS)
        if state is not None:
            optimizer.load_state_dict(state[0])
            progress.load_state_dict(state[1])
        for _ in range(num_steps):
            parts.append(learning_rates(optimizer))
            optimizer.step()
            progress.step()
        state = optimizer.state_dict(), progress.state_dict()
    assert parts == unbroken  # bit for bit
