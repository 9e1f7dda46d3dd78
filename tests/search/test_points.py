"""Points that the user gives to start with."""

from __future__ import annotations

from typing import Any

import pytest

from drtune_ray.config import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.search.points import start_points
from drtune_ray.search.space import SearchSpace

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


def test_every_value_that_is_not_of_the_space_is_named(space):
    given = [{"optim.backbone_l": 0.01}, {"optim.backbone_lr": 5, "optim.nesterov": False}]
    with pytest.raises(ConfigError) as caught:
        start_points(space, given)
    assert caught.value.problems == (
        "start_with, point 1: unknown parameter 'optim.backbone_l'; did you mean "
        "'optim.backbone_lr'? (what the space does not search belongs into trial)",
        "start_with, point 2: optim.backbone_lr=5 is not in the search space: "
        "{'float': [0.0001, 0.1], 'log': True}",
        "start_with, point 2: unknown parameter 'optim.nesterov'; did you mean "
        "'optim.backbone_lr'? (what the space does not search belongs into trial)",
    )
