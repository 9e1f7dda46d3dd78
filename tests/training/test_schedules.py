"""Learning rates by step, against the schedules' formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from drtune_ray.config.training import OptimConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.training.optim import build_optimizer, learning_rates
from drtune_ray.training.schedules import build_schedule

EPOCHS, STEPS, RATE = 8, 5, 0.5
TOTAL = EPOCHS * STEPS


def rates(num_steps: int = TOTAL, **values: Any) -> list[float]:
    config = OptimConfig(backbone_lr=RATE, **values)
    optimizer = build_optimizer(nn.Linear(2, 2), nn.Linear(2, 2), config, 3.0)
    schedule = build_schedule(optimizer, config, EPOCHS, STEPS)
    found = []
    for _ in range(num_steps):
        found.append(learning_rates(optimizer))
        optimizer.step()
        schedule.step()
    assert all(rate["head"] == pytest.approx(3.0 * rate["backbone"]) for rate in found)
    return [rate["backbone"] for rate in found]


def test_linear_is_a_line_to_zero() -> None:
    found = rates(TOTAL + 2, schedule="linear")
    wanted = [RATE * (1 - step / TOTAL) for step in range(TOTAL)] + [0.0, 0.0]
    assert found == pytest.approx(wanted, abs=1e-12)


def test_step_is_that_of_pytorch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.2)
    wanted = []
    for _ in range(EPOCHS):
        wanted += [optimizer.param_groups[0]["lr"]] * STEPS
        optimizer.step()
        by_epoch.step()
    assert rates(schedule="step", step_epochs=3, step_gamma=0.2) == pytest.approx(wanted)
    assert len(set(wanted)) == 3


@pytest.mark.parametrize("warmup", [2, 1.5, 0.4])
@pytest.mark.parametrize("schedule", ["cosine", "cosine_per_epoch", "linear", "step", "constant"])
def test_the_warmup_rises_in_equal_steps_and_the_schedule_has_what_is_left(
    warmup: float, schedule: str
) -> None:
    found = rates(warmup_epochs=warmup, schedule=schedule, step_epochs=3, step_gamma=0.2)
    num_warm = math.ceil(warmup * STEPS)
    rises = [found[0], *(b - a for a, b in zip(found, found[1:num_warm], strict=False))]
    assert rises == pytest.approx([RATE / (warmup * STEPS + 1)] * num_warm)
    for step in range(num_warm, TOTAL):
        epoch = step // STEPS
        done = (step / STEPS - warmup) / (EPOCHS - warmup)
        of_epoch = max(epoch - warmup, 0) / (EPOCHS - warmup)
        wanted = {
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "cosine_per_epoch": 0.5 * (1 + math.cos(math.pi * of_epoch)),
            "linear": 1 - done,
            "step": 0.2 ** (epoch // 3),
            "constant": 1.0,
        }[schedule]
        assert found[step] == pytest.approx(RATE * wanted, abs=1e-12), step


def test_a_warmup_as_long_as_the_training_is_refused() -> None:
    values: dict[str, Any] = {"data": {"train": "images"}, "training": {"epochs": 3}}
    TrialConfig.from_mapping(values | {"optim": {"warmup_epochs": 2.9}})
    with pytest.raises(ConfigError, match="warmup_epochs=3 and epochs=3"):
        TrialConfig.from_mapping(values | {"optim": {"warmup_epochs": 3}})
