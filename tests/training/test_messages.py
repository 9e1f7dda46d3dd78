"""What a step sends is what the formula in docs/method.md and benchmarks/scaling.py says."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drtune_ray.config.method import CalibrationConfig
from drtune_ray.method.collective import Collective
from tests.method.tiny import D, make_data, make_method

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORLD_SIZE, BATCH, CLASSES, INTERVAL, RANK = 3, 7, 5, 2, 2
SHARES = [3, 2, 2]
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "plain means": {"confidence_weighting": False},
    "no translation": {"translation": False},
    "no translation, not recentred": {"translation": False, "recenter": False},
    "no translation, R not kept": {"translation": False, "rotation_kept": False},
    "neither": {"translation": False, "rotation": False},
    "exact rotation": {"rotation_solver": "svd"},
    "rank above the features": {"rotation_rank": 99},
}


class CountingRank(Collective):
    """The first of some processes, of which the others say what it says."""

    rank, world_size, num_floats = 0, WORLD_SIZE, 0

    def sum(self, tensor: Tensor) -> Tensor:
        return self._counted(tensor)

    def gather_rows(self, rows: Tensor, shares: Sequence[int]) -> Tensor:
        longest = torch.cat([rows] * WORLD_SIZE)
        self._counted(torch.cat([longest[: max(shares)]] * WORLD_SIZE))
        return longest[: sum(shares)]

    def broadcast(self, tensor: Tensor) -> Tensor:
        return self._counted(tensor)

    def _counted(self, tensor: Tensor) -> Tensor:
        self.num_floats += tensor.numel()
        return tensor


@pytest.mark.parametrize("bank_size", [5, 30])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_step_sends_as_many_floats_as_the_formula_says(monkeypatch, changes, bank_size):
    monkeypatch.syspath_prepend(BENCHMARKS)
    scaling = importlib.import_module("scaling")
    config = CalibrationConfig(**{"rotation_rank": RANK, "rotation_interval": INTERVAL} | changes)
    collective = CountingRank()
    options = config.model_dump()
    options["restart_each_epoch"] = options.pop("rotation_restarts_each_epoch")
    method = make_method(bank_size, options, collective=collective)
    images, labels = make_data(BATCH)
    own = slice(0, SHARES[0])
    method.warm_up(images[own], labels[own], None, SHARES)
    collective.num_floats = 0
    for _ in range(2 * INTERVAL):
        method(images[own], labels[own], None, SHARES)
    sizes = scaling.Sizes(BATCH, bank_size, D, CLASSES, config.rotation_rank, 0, INTERVAL)
    formula = scaling.floats_per_step(sizes, WORLD_SIZE, config)
    # The two flags and the gradients are not the method's.
    assert collective.num_floats / (2 * INTERVAL) == sum(formula.values()) - 2
