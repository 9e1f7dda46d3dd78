"""The frozen-feature table stands for the frozen encoder: same features, same losses."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import TrainingData
from drtune_ray.data.table_store import TableStore
from drtune_ray.errors import ConfigError
from drtune_ray.study.inputs import check_inputs
from drtune_ray.study.tables import prepare
from drtune_ray.training import frozen_features
from drtune_ray.training.backbones import Backbone
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.reports import EpochReport
from drtune_ray.training.trial import Trial
from tests.small import prepared, small_trial, small_values, write_coloured

CPU = torch.device("cpu")
NUM_STEPS = 20
Values = dict[str, Any]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, weights_file: Callable[[str], Path]) -> Values:
    """Five epochs of four steps: every view is used at least twice."""
    images = write_coloured(tmp_path_factory.mktemp("coloured"))
    return small_values(images, weights_file) | {"training.epochs": 5, "optim.backbone_lr": 0.005}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


def cached_and_live(
    config: TrialConfig, storage: Path
) -> tuple[TrainingData, TrainingData, Backbone]:
    """The same mapped views with the table of features and without it."""
    data, backbone, tables = prepared(config, storage)
    assert tables.views and tables.features
    interpolation = backbone.normalization.interpolation
    live = TrainingData(replace(tables, features=None), config.data, interpolation)
    assert data.has_features and not live.has_features
    return data, live, backbone


def test_features__cached_and_live_agree(values: Values, storage: Path) -> None:
    config = small_trial(values)
    cached, live, backbone = cached_and_live(config, storage)
    trial = Trial(config, live, backbone, CPU)
    encoder = trial.method.pretrained_encoder
    batches = [[3, 27, 0, 11, 5], [8], list(range(12, 25))]
    for view in range(config.data.views):
        pairs = zip(batches, live.training_batches(batches, view), strict=True)
        for rows, (pixels, _) in pairs:
            with torch.inference_mode():
                expected = encoder(trial.normalizer(pixels))
            found = cached.pretrained_features(rows, view)
            assert found is not None
            difference = (found - expected).norm(dim=1) / expected.norm(dim=1)
            assert difference.max() <= 1e-5


def losses(config: TrialConfig, data: TrainingData, backbone: Backbone) -> torch.Tensor:
    events = list(train_epochs(config, data, backbone, num_threads=1))
    last = events[-1]
    assert isinstance(last, EpochReport)
    steps = [step for record in last.history for step in record.steps]
    return torch.tensor([list(step.values()) for step in steps[:NUM_STEPS]], dtype=torch.float64)


@pytest.mark.parametrize("changes", [{}, {"method.reduction": "mean"}], ids=["default", "mean"])
def test_losses__of_the_first_steps_agree(values: Values, storage: Path, changes: Values) -> None:
    config = small_trial(values | changes)
    cached, live, backbone = cached_and_live(config, storage)
    found, expected = (losses(config, data, backbone) for data in (cached, live))
    assert len(found) == NUM_STEPS
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)


def test_losses__with_the_features_of_other_views_they_do_not_agree(
    values: Values, storage: Path
) -> None:
    config = small_trial(values)
    data, backbone, tables = prepared(config, storage)
    others = prepared(small_trial(values | {"data.view_seed": 1}), storage)[2]
    interpolation = backbone.normalization.interpolation
    mixed = TrainingData(replace(tables, features=others.features), config.data, interpolation)
    found, expected = (losses(config, of, backbone) for of in (mixed, data))
    assert ((found - expected).abs() > 1e-4 * expected.abs()).any()


def test_features__another_view_has_others(values: Values, storage: Path) -> None:
    cached, _, _ = cached_and_live(small_trial(values), storage)
    first, second = (cached.pretrained_features([0, 1, 2], view) for view in (0, 1))
    assert first is not None and second is not None
    assert ((first - second).norm(dim=1) / first.norm(dim=1)).min() > 1e-3


# ---- finalist seeds: a table a seed, shared by the methods that are compared on it


def test_tables__one_a_view_seed_paired_between_methods(values: Values, storage: Path) -> None:
    features: dict[int, set[Path | None]] = {}
    for seed in (0, 1, 2):
        for method in ("dr_tune", "ce_tuning"):
            changes = {"data.view_seed": seed, "method.name": method, "seed": seed}
            tables = prepared(small_trial(values | changes), storage)[2]
            features.setdefault(seed, set()).add(tables.features)
    assert all(len(paths) == 1 for paths in features.values())
    assert len(set.union(*features.values())) == 3


# ---- drivers that start together


def prepare_and_count(values: Values, storage: Path, start: Any, builds: Any) -> None:
    """What a driver does at its start; runs in a process of its own."""
    written = frozen_features._features

    def counted(*args: Any) -> Any:
        builds.put("features")
        return written(*args)

    frozen_features._features = counted
    start.wait()
    prepared(small_trial(values), storage)


@pytest.mark.slow
def test_prepare__two_drivers_started_together_compute_the_features_once(
    values: Values, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    start, builds = context.Barrier(2), context.SimpleQueue()
    arguments = (values, tmp_path, start, builds)
    drivers = [context.Process(target=prepare_and_count, args=arguments) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert [driver.exitcode for driver in drivers] == [0, 0]
    assert builds.get() == "features"
    assert builds.empty()


def test_features__not_finite_are_refused(values: Values, tmp_path: Path) -> None:
    """The weights are at fault, not the point of the search: no trial may be blamed for it."""
    config = small_trial(values)
    checked = check_inputs(config, tmp_path)
    name = next(n for n in checked.backbone.state if n.endswith("bn1.bias"))
    state = dict(checked.backbone.state) | {name: checked.backbone.state[name] * torch.nan}
    broken = replace(checked, backbone=replace(checked.backbone, state=state))
    message = "gives features that are not finite .view 0.: check backbone.weights"
    with TableStore(tmp_path, 1.0) as store, pytest.raises(ConfigError, match=message):
        prepare(broken, config, store, "cpu")
    assert not list((tmp_path / "cache").glob("features-*"))
