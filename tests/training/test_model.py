"""What cannot work is refused before a trial starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.errors import ConfigError
from drtune_ray.study.inputs import check_inputs
from drtune_ray.training.backbones import load_backbone
from drtune_ray.training.model import check_last_batch, check_trial, derived_seed
from tests.small import BACKBONE, NORM_FREE, small_trial, small_values, write_coloured

SYNCHRONISED = {"data.train": "unused", "training.batch_norm": "synchronised"}
NEEDS_GPUS = (
    "training.batch_norm=synchronised needs a GPU for each of several workers: set "
    "resources.gpus_per_worker or training.batch_norm=frozen"
)


def problems(changes: dict[str, Any], **options: Any) -> list[str]:
    return check_trial(small_trial(SYNCHRONISED | changes), 12, **options)


@pytest.mark.parametrize("here", [False, True])
def test_synchronised_batch_norm_needs_gpus_of_the_workers_not_of_this_process(monkeypatch, here):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    two = {"training.batch_size": 6, "training.workers": 2}
    assert problems(two, on_gpus=True) == []
    assert problems(two) == problems(two, on_gpus=False) == [NEEDS_GPUS]
    assert problems(two | {"training.workers": 1}) == []


@pytest.mark.parametrize("gpus", [{"gpus_per_worker": 1.0}, {"gpus_per_trial": 0.5}])
def test_what_the_workers_get_decides(tmp_path, weights_file, gpus):
    values = small_values(write_coloured(tmp_path / "images", per_class=4), weights_file)
    values |= {"training.batch_norm": "synchronised", "training.workers": 2}
    config = small_trial(values | {"training.batch_size": 2})
    assert check_inputs(config, tmp_path, resources=ResourcesConfig(**gpus)).num_train
    for none in (None, ResourcesConfig()):
        with pytest.raises(ConfigError) as caught:
            check_inputs(config, tmp_path, resources=none)
        assert caught.value.problems == (NEEDS_GPUS,)


def test_synchronised_batch_norm_needs_a_row_for_each_worker_in_every_batch():
    changes = {"training.workers": 4, "training.batch_size": 3}
    message = (
        "training.batch_norm=synchronised needs a row for each of 4 workers, but got "
        "training.batch_size=3: set it to at least 4"
    )
    assert problems(changes, on_gpus=True) == [message]
    # Without a short last batch too: all batches are too short.
    assert problems(changes | {"training.drop_last": True}, on_gpus=True) == [message]
    assert problems(changes | {"training.batch_size": 4}, on_gpus=True) == []
    assert problems(changes | {"training.batch_size": 5}, on_gpus=True) == [
        "training.batch_norm=synchronised needs a row for each of 4 workers, but the last batch "
        "of 12 images has 2: set training.drop_last=true or another training.batch_size"
    ]


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, True),
        ({"training.batch_size": 1, "training.drop_last": True}, True),
        ({"training.drop_last": True}, False),
        ({"training.batch_norm": "frozen"}, False),
        ({"training.batch_size": 10}, False),
        ({"data.image_size": 64}, False),  # four values per channel
        ({"backbone.name": NORM_FREE}, False),
    ],
)
def test_batch_norm_of_one_image_is_refused_where_it_would_see_one_value(
    tmp_path, weights_file, changes, is_refused
):
    name = changes.get("backbone.name", BACKBONE)
    values = small_values(tmp_path, weights_file, name)
    values |= {"training.batch_norm": "local", "training.batch_size": 27} | changes
    config = small_trial(values)
    backbone, _ = load_backbone(config.backbone, config.data.image_size)
    assert bool(check_last_batch(config, 28, backbone)) == is_refused


def test_every_index_has_a_seed_of_its_own():
    seeds = {derived_seed(0, "training", 1), derived_seed(0, "training", 1, 0)}
    seeds |= {derived_seed(0, "training", 1, *at) for at in ((0, 0), (0, 1), (1, 0))}
    assert len(seeds) == 5
    assert derived_seed(3, "head") == derived_seed(3, "head", 0)
