"""Which kinds of prepared tables a space asks for."""

from __future__ import annotations

from typing import Any

import pytest

from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.study.tables import MAX_VARIANTS, table_variants


@pytest.fixture
def base(make_trial: Any) -> TrialConfig:
    return make_trial({"backbone.name": "resnet18", "data.image_size": 64})


def kinds(parameters: dict[str, Any], base: TrialConfig) -> list[tuple[str, str, int]]:
    space = SearchSpace.from_mapping({"parameters": parameters}, base)
    variants = table_variants(space, base)
    assert len({config.tables_key for config in variants}) == len(variants)
    return [(c.backbone.name, c.backbone.weights, c.data.image_size) for c in variants]


def test_one_where_nothing_of_them_is_searched(base):
    assert kinds({"optim.backbone_lr": {"float": [0.1, 0.2]}}, base) == [("resnet18", "timm", 64)]


def test_every_combination_and_what_follows_from_it(base):
    found = kinds(
        {
            "backbone.name": {"choice": ["resnet18", "resnet50"]},
            "backbone.weights": {
                "expression": "'timm' if backbone.name == 'resnet18' else 'mine.pth'"
            },
            "data.image_size": {"ordered": [64, 96]},
        },
        base,
    )
    assert sorted(found) == [
        ("resnet18", "timm", 64),
        ("resnet18", "timm", 96),
        ("resnet50", "mine.pth", 64),
        ("resnet50", "mine.pth", 96),
    ]
    assert found[0] == ("resnet18", "timm", 64)  # the base's own


def test_conditions_leave_out_what_never_occurs(base):
    found = kinds(
        {
            "backbone.name": {"choice": ["resnet18", "resnet50"]},
            "data.image_size": {"ordered": [64, 96], "when": {"backbone.name": "resnet50"}},
        },
        base,
    )
    assert ("resnet18", "timm", 96) not in found and len(found) == 3


def test_a_condition_on_a_range(base):
    found = kinds(
        {
            "optim.backbone_lr": {"float": [0.001, 0.1], "log": True},
            "data.image_size": {"ordered": [64, 96], "when": "optim.backbone_lr < 0.01"},
        },
        base,
    )
    assert sorted(size for _, _, size in found) == [64, 96]


def test_too_many_are_refused(base):
    sizes = [32 * number for number in range(1, MAX_VARIANTS + 3)]
    space = SearchSpace.from_mapping({"parameters": {"data.image_size": {"ordered": sizes}}}, base)
    with pytest.raises(ConfigError, match="more than 16 kinds of prepared images and features"):
        table_variants(space, base)


def test_tables_of_trials_that_train_differently_are_the_same(base):
    same = base.with_values(
        {
            "optim.backbone_lr": 0.5,
            "seed": 3,
            "method.bank_size": 7,
            "data.sampling": "class_balanced",
            "backbone.drop_path": 0.1,
            "training.mixup": 0.5,
        }
    )
    assert same.tables_key == base.tables_key
    changes: dict[str, Any] = {
        "data.views": 3,
        "data.view_seed": 5,
        "data.crop_scale_min": 0.9,
        "data.augmentation": "rand_augment",
        "data.augmentation_magnitude": 3,
        "data.random_erasing": 0.5,
    }
    for path, value in changes.items():
        assert base.with_values({path: value}).tables_key != base.tables_key
