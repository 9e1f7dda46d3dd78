from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from drtune_ray.config import TrialConfig
from drtune_ray.data.cache import MappedArray, read_images, read_table
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.sources import content_hash
from drtune_ray.data.splits import TEST
from drtune_ray.data.views import ViewMaker
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.search.prepare import Checked, check_inputs, manifest_path, prepare
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.frozen import normalized
from tests.conftest import MakeTrial, WriteImages

BACKBONE = "test_efficientnet"


@pytest.fixture
def trial(
    make_trial: MakeTrial, class_folder: Path, weights_file: Callable[[str], Path]
) -> TrialConfig:
    """12 images to train, 4 to validate, 4 sealed; two views of 32 pixels."""
    return make_trial(
        {
            "data.train": str(class_folder),
            "data.image_size": 32,
            "data.views": 2,
            "backbone.name": BACKBONE,
            "backbone.weights": str(weights_file(BACKBONE)),
            "training.batch_size": 4,
        }
    )


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


def prepared(trial: TrialConfig, storage: Path) -> Tables:
    return prepare(check_inputs(trial, storage), trial, storage, "cpu")


def training_data(tables: Tables, trial: TrialConfig) -> TrainingData:
    interpolation = read_backbone(tables.backbone).normalization.interpolation
    return TrainingData(tables, trial.data, interpolation)


def files_in(folder: Path) -> dict[str, int]:
    """Names and times of last change."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.*")}


def split_of(checked: Checked) -> dict[str, str]:
    manifest = checked.splits.manifest
    paths, splits = manifest["path"].to_pylist(), manifest["split"].to_pylist()
    return dict(zip(paths, splits, strict=True))


# ---- check_inputs


def test_check_inputs__what_it_found(trial: TrialConfig, storage: Path) -> None:
    checked = check_inputs(trial, storage)
    assert checked.num_train == 12
    assert checked.summary().startswith(
        "2 classes; 12 to train, 4 to validate, 4 sealed for the test; "
    )
    assert "100.0% of the encoder's weights by name; 2 unused" in checked.summary()
    assert checked.backbone.name == BACKBONE
    assert checked.key_report.matched_share == 1.0
    assert not storage.exists()  # nothing is written by looking


def test_check_inputs__every_problem_at_once(trial: TrialConfig, storage: Path) -> None:
    def check_space() -> None:
        raise ConfigError(["the space is wrong", "in two ways"])

    config = trial.with_values(
        {
            "training.batch_size": 13,
            "training.workers": 2,
            "training.batch_norm": "local",
            "backbone.weights": "missing.pth",
        }
    )
    with pytest.raises(ConfigError) as caught:
        check_inputs(config, storage, [check_space])
    assert caught.value.problems == (
        "the space is wrong",
        "in two ways",
        "training.batch_size <= number of training images must hold, but got batch_size=13 with "
        "12 images; set training.batch_size to at most 12",
        "training.batch_norm=local normalises over a part of the batch with training.workers=2: "
        "set frozen or synchronised",
        "backbone.weights='missing.pth' is not a file: give a file, 'timm' or 'demo'",
    )


def test_check_inputs__images_and_backbone_both_wrong(trial: TrialConfig, storage: Path) -> None:
    config = trial.with_values({"data.train": "nowhere", "backbone.name": "test_efficientnett"})
    with pytest.raises(ConfigError) as caught:
        check_inputs(config, storage)
    first, second = caught.value.problems
    assert first.endswith("nowhere' is not a folder: give a folder of class folders")
    assert second.startswith("backbone.name='test_efficientnett' is not a model of timm ")


@pytest.mark.usefixtures("unreachable_hub")
def test_check_inputs__weights_that_cannot_be_fetched(trial: TrialConfig, storage: Path) -> None:
    config = trial.with_values({"backbone.weights": "timm"})
    with pytest.raises(EnvironmentProblem, match="^the weights of 'test_efficientnet' must be "):
        check_inputs(config, storage)
    # With other problems it is one of them, and these are the user's to mend.
    with pytest.raises(ConfigError) as caught:
        check_inputs(config.with_values({"training.batch_size": 13}), storage)
    assert [problem.split(" must ")[0] for problem in caught.value.problems] == [
        "training.batch_size <= number of training images",
        "the weights of 'test_efficientnet'",
    ]


# ---- prepare


def test_prepare__writes_once_and_uses_what_is_there(trial: TrialConfig, storage: Path) -> None:
    tables = prepared(trial, storage)
    assert tables.classes == ("cat", "dog")
    paths = [tables.images, tables.views, tables.evaluation, tables.features, tables.backbone]
    assert all(path is not None and path.exists() for path in paths)
    manifest = pq.read_table(manifest_path(trial.data, storage))
    assert manifest["split"].to_pylist().count(TEST) == 4
    before = files_in(storage / "cache")
    assert len(before) == 5
    assert prepared(trial, storage) == tables
    assert files_in(storage / "cache") == before


def test_prepare__no_row_of_the_test_split(trial: TrialConfig, storage: Path) -> None:
    checked = check_inputs(trial, storage)
    tables = prepare(checked, trial, storage, "cpu")
    sealed = set(checked.splits.rows(TEST)["content_hash"].to_pylist())
    assert not sealed & set(read_table(tables.images)["content_hash"].to_pylist())
    assert tables.views and tables.evaluation and tables.features
    assert len(MappedArray(tables.views)) == len(MappedArray(tables.features)) == 2 * 12
    assert len(MappedArray(tables.evaluation)) == 4


def test_prepare__features_are_the_pretrained_encoders(trial: TrialConfig, storage: Path) -> None:
    tables = prepared(trial, storage)
    data, backbone = training_data(tables, trial), read_backbone(tables.backbone)
    encoder = backbone.build().eval()
    maker = ViewMaker(trial.data, backbone.normalization.interpolation)
    train, validation = read_images(tables.images)
    assert data.has_features
    for view in (1, 0):
        rows = [7, 0, 3]
        ((pixels, labels),) = data.training_batches([rows], view)
        expected = np.stack([train.training_view(maker, row, view) for row in rows])
        assert np.array_equal(pixels.numpy(), expected)
        assert labels.tolist() == train.labels[rows].tolist()
        with torch.inference_mode():
            features = encoder(normalized(pixels, backbone.normalization))
        found = data.pretrained_features(rows, view)
        assert found is not None
        assert torch.allclose(found, features, atol=1e-5)
        assert features.std() > 1e-3
    ((pixels, labels),) = data.validation_batches([[3, 1]])
    expected = np.stack([validation.evaluation_view(maker, row) for row in (3, 1)])
    assert np.array_equal(pixels.numpy(), expected)
    assert labels.tolist() == validation.labels[[3, 1]].tolist()


def test_prepare__pixels_over_the_limit_are_made_again_each_time(
    trial: TrialConfig, storage: Path, tmp_path: Path
) -> None:
    mapped = prepared(trial, storage)
    unlimited = trial.with_values({"data.cache_limit_gib": 0.0})
    tables = prepared(unlimited, tmp_path / "other")
    assert tables.views is None
    assert tables.evaluation is None
    assert tables.features is not None and mapped.features is not None
    first, second = training_data(mapped, trial), training_data(tables, unlimited)
    rows = [5, 11, 0]
    for view in range(2):
        ((pixels, _),) = first.training_batches([rows], view)
        ((again, _),) = second.training_batches([rows], view)
        assert torch.equal(pixels, again)
        features = [data.pretrained_features(rows, view) for data in (first, second)]
        assert features[0] is not None and features[1] is not None
        assert torch.equal(features[0], features[1])
    ((pixels, _),) = first.validation_batches([[0, 3]])
    ((again, _),) = second.validation_batches([[0, 3]])
    assert torch.equal(pixels, again)


def test_prepare__live_features(trial: TrialConfig, storage: Path) -> None:
    live = trial.with_values({"data.views": 0})
    tables = prepared(live, storage)
    assert (tables.views, tables.features) == (None, None)
    data = training_data(tables, live)
    assert not data.has_features
    assert data.pretrained_features([0], 0) is None
    assert [data.view_of_epoch(epoch) for epoch in (-1, 0, 1, 7)] == [-1, 0, 1, 7]
    batches = [next(data.training_batches([[0]], data.view_of_epoch(e)))[0] for e in (-1, 0, 1)]
    assert len({batch.numpy().tobytes() for batch in batches}) == 3


def test_prepare__views_take_turns(trial: TrialConfig, storage: Path) -> None:
    data = training_data(prepared(trial, storage), trial)
    assert [data.view_of_epoch(epoch) for epoch in (-1, 0, 1, 2, 7)] == [1, 0, 1, 0, 1]


def test_training_batches__global_random_state_is_untouched(
    trial: TrialConfig, storage: Path
) -> None:
    data = training_data(prepared(trial, storage), trial)
    before = torch.get_rng_state()
    assert len(list(data.training_batches([[0, 1], [2], [3, 4, 5]], 0))) == 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"training.epochs": 3, "method.bank_size": 4, "optim.backbone_lr": 0.1}, 5),
        ({"data.view_seed": 1}, 2),  # images and backbone
        ({"data.horizontal_flip": 0.0}, 2),
        ({"data.views": 1}, 2),
        ({"data.image_size": 48}, 1),
        ({"data.test_fraction": 0.3}, 1),  # the backbone
        ({"seed": 5}, 5),
    ],
)
def test_prepare__names_follow_what_decides_the_content(
    trial: TrialConfig, storage: Path, change: dict[str, Any], same: int
) -> None:
    before = vars(prepared(trial, storage))
    after = vars(prepared(trial.with_values(change), storage))
    kept = [name for name in before if name != "classes" and before[name] == after[name]]
    assert len(kept) == same, kept


def test_prepare__other_weights_other_features(trial: TrialConfig, storage: Path) -> None:
    checked = check_inputs(trial, storage)
    state = {name: tensor * 1.5 for name, tensor in checked.backbone.state.items()}
    other = replace(checked, backbone=replace(checked.backbone, state=state))
    first = prepare(checked, trial, storage, "cpu")
    second = prepare(other, trial, storage, "cpu")
    assert first.features != second.features
    assert first.backbone != second.backbone
    assert (first.images, first.views) == (second.images, second.views)


def test_tables__plain_values_round_trip(trial: TrialConfig, storage: Path) -> None:
    tables = prepared(trial.with_values({"data.cache_limit_gib": 0.0}), storage)
    plain = tables.to_mapping()
    assert plain["views"] is None
    assert plain["images"] == str(tables.images)
    assert Tables.from_mapping(plain) == tables


# ---- the storage remembers the splits


def test_prepare__later_images_do_not_move_old_ones(
    trial: TrialConfig, storage: Path, write_images: WriteImages, tmp_path: Path
) -> None:
    cats = write_images({"cat": 20, "dog": 10}) / "cat"
    # Those that come first in the order of the hash come later: all would move, if any did.
    later = sorted(cats.iterdir(), key=lambda path: content_hash(path.read_bytes()))[:10]
    for path in later:
        path.rename(tmp_path / path.name)
    first = check_inputs(trial, storage)
    prepare(first, trial, storage, "cpu")
    for path in later:
        (tmp_path / path.name).rename(path)
    second = check_inputs(trial, storage)
    assert split_of(first).items() <= split_of(second).items()
    assert second.num_train == 12 + 6
    assert not split_of(first).items() <= split_of(check_inputs(trial, storage / "fresh")).items()


def test_manifest_path__one_a_folder_and_quota(trial: TrialConfig, storage: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"data.train": "elsewhere"},
        {"data.test_fraction": 0.3},
        {"data.validation_fraction": 0.3},
        {"data.train_per_class": 3},
    ]
    paths = {manifest_path(trial.with_values(change).data, storage) for change in changes}
    assert len(paths) == len(changes)
    same = trial.with_values({"data.views": 4, "data.image_size": 64})
    assert manifest_path(same.data, storage) in paths
