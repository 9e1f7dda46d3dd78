"""Points that the user gives to start with."""

from __future__ import annotations

from typing import Any

import pytest

from drtune_ray.config.trial import TrialConfig
from drtune_ray.space.search_space import SearchSpace, start_points

PARAMETERS = {
    "optim.backbone_lr": {"float": [1e-4, 0.1], "log": True},
    "training.batch_size": {"ordered": [8, 16, 32]},
    "optim.nesterov": {"constant": True},
}


@pytest.fixture
def space(make_trial: Any) -> SearchSpace:
    base: TrialConfig = make_trial()
    return SearchSpace.from_mapping({"parameters": PARAMETERS}, base)


def test_values_by_path_or_nested_as_optuna_holds_them(space):
    given = [{"optim.backbone_lr": 0.01}, {"training": {"batch_size": 16}}]
    assert start_points(space, given) == (
        {"optim.backbone_lr": 0.01},
        {"training.batch_size [8, 16, 32]": 1},
    )
