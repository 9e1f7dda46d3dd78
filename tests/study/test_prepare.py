from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.cache import MappedArray, read_images, read_table
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.sources import content_hash
from drtune_ray.data.splits import TEST
from drtune_ray.data.table_store import TABLE_SUFFIXES, TableStore
from drtune_ray.data.views import ViewMaker
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.study.inputs import StudyInputs, check_encoders, check_inputs, manifest_path
from drtune_ray.study.tables import prepare
from drtune_ray.training import frozen_features
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.frozen_features import Normalizer
from drtune_ray.training.model import check_trial
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


def prepared(
    trial: TrialConfig, storage: Path, checked: StudyInputs | None = None, device: str = "cpu"
) -> Tables:
    with TableStore(storage, trial.data.cache_limit_gib) as store:
        return prepare(checked or check_inputs(trial, storage), trial, store, device)


def training_data(tables: Tables, trial: TrialConfig) -> TrainingData:
    interpolation = read_backbone(tables.backbone).normalization.interpolation
    return TrainingData(tables, trial.data, interpolation)


def files_in(folder: Path) -> dict[str, int]:
    """Names and times of last change."""
    tables = (path for path in folder.iterdir() if path.suffix in TABLE_SUFFIXES)
    return {path.name: path.stat().st_mtime_ns for path in tables}


def split_of(checked: StudyInputs) -> dict[str, str]:
    manifest = checked.splits.manifest
    paths, splits = manifest["path"].to_pylist(), manifest["split"].to_pylist()
    return dict(zip(paths, splits, strict=True))


# ---- check_inputs


def test_check_inputs__what_it_found(trial: TrialConfig, storage: Path) -> None:
    checked = check_inputs(trial, storage)
    assert checked.num_train == 12
    about, classes, normalization = checked.notes()
    assert classes == "images per class: cat 10, dog 10"
    assert about.startswith("2 classes; 12 to train, 4 to validate, 4 sealed for the test; ")
    assert "all of the encoder's weights loaded, matched by name; 2 tensors" in about
    assert normalization.startswith("normalization: mean [0.485, 0.456, 0.406], ")
    assert checked.backbone.name == BACKBONE
    assert checked.key_report.matched_share == 1.0
    assert not storage.exists()  # nothing is written by looking


def test_check_encoders__reports_each_once(
    trial: TrialConfig, storage: Path, weights_file: Callable[[str], Path]
) -> None:
    checked = check_inputs(trial, storage)
    vit = {"backbone.name": "test_vit", "backbone.weights": str(weights_file("test_vit"))}
    others = [vit, vit | {"data.image_size": 48}, {"data.image_size": 48}]
    lines = check_encoders(checked, map(trial.with_values, others)).notes()
    assert lines[:3] == checked.notes()
    of_vit, of_larger_images = lines[3:]
    assert of_vit.startswith("test_vit: all of the encoder's weights loaded, matched by name; 2 ")
    assert "; normalization: mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5], timm's for " in of_vit
    assert "; 1 tensor resized to the image size (pos_embed); " in of_larger_images


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


def test_check_inputs__synchronised_batch_norm_needs_a_row_for_each_worker(
    trial: TrialConfig, storage: Path
) -> None:
    values = {"training.batch_norm": "synchronised", "training.batch_size": 11}
    config = trial.with_values(values | {"training.workers": 2})
    message = "the last batch of 12 images has 1: set training.drop_last=true or another"
    with pytest.raises(ConfigError, match=message):
        check_inputs(config, storage)
    sound = [{"training.drop_last": True}, {"training.batch_size": 6}, {"training.workers": 1}]
    for change in sound:
        problems = check_trial(config.with_values(change), 12)
        assert not any("last batch" in problem for problem in problems)


def test_check_inputs__images_and_backbone_both_wrong(trial: TrialConfig, storage: Path) -> None:
    config = trial.with_values({"data.train": "nowhere", "backbone.name": "test_efficientnett"})
    with pytest.raises(ConfigError) as caught:
        check_inputs(config, storage)
    first, second = caught.value.problems
    assert "nowhere' is neither a folder nor a file: give a folder of class folders" in first
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
    tables = prepared(trial, storage, checked)
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
            features = encoder(Normalizer(backbone.normalization, torch.device("cpu"))(pixels))
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
        ({"method.name": "ce_tuning"}, 5),  # the same table for every method
        ({"data.view_seed": 1}, 3),  # images, backbone and evaluation
        ({"data.crop_scale_min": 0.40001}, 3),
        ({"data.horizontal_flip": 0.0}, 3),
        ({"data.views": 1}, 3),
        ({"data.crop_fraction": 1.0}, 4),
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
    first = prepared(trial, storage, checked)
    second = prepared(trial, storage, other)
    assert first.features != second.features
    assert first.backbone != second.backbone
    assert (first.images, first.views) == (second.images, second.views)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
        {"interpolation": "bilinear"},
    ],
)
def test_prepare__other_normalization_other_features(
    trial: TrialConfig, storage: Path, changes: dict[str, Any]
) -> None:
    checked = check_inputs(trial, storage)
    normalization = replace(checked.backbone.normalization, **changes)
    other = replace(checked, backbone=replace(checked.backbone, normalization=normalization))
    first, second = prepared(trial, storage, checked), prepared(trial, storage, other)
    assert first.features != second.features
    assert first.backbone != second.backbone
    assert (first.views == second.views) == ("interpolation" not in changes)


def test_prepare__other_torch_other_features(
    trial: TrialConfig, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(trial, storage)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    second = prepared(trial, storage)
    assert first.features != second.features
    assert first == replace(second, features=first.features)


def test_prepare__other_device_or_precision_other_features(
    trial: TrialConfig, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(trial, storage)
    monkeypatch.setattr(frozen_features, "FEATURES_DTYPE", "float64")
    second = prepared(trial, storage)
    third = prepared(trial, storage, device="cpu:0")  # where a test has no other device
    assert len({tables.features for tables in (first, second, third)}) == 3
    assert first.views == second.views == third.views


def test_prepare__pixels_fit_beside_what_a_trial_needs(trial: TrialConfig, storage: Path) -> None:
    tables = prepared(trial, storage)
    paths = [tables.images, tables.backbone, tables.features, tables.views, tables.evaluation]
    num_bytes = sum(path.stat().st_size for path in paths if path)
    enough = trial.with_values({"data.cache_limit_gib": num_bytes / 2**30})
    assert prepared(enough, storage) == tables
    pixels = 28 * 3 * 32**2  # 12 images in two views, 4 to validate
    too_little = trial.with_values({"data.cache_limit_gib": (pixels + 1000) / 2**30})
    assert prepared(too_little, storage) == replace(tables, views=None, evaluation=None)


def test_prepare__former_tables_give_way(trial: TrialConfig, storage: Path) -> None:
    first = prepared(trial, storage)
    needed = sum(path.stat().st_size for path in (first.images, first.backbone))
    other = trial.with_values({"data.view_seed": 1, "data.cache_limit_gib": needed / 2**30})
    second = prepared(other, storage)
    assert second.features and second.features.exists()
    assert second.images == first.images and second.images.exists()
    assert first.views and first.features and first.evaluation
    assert not any(p.exists() for p in (first.views, first.features, first.evaluation))


def test_prepare__every_damaged_table_is_built_again(
    trial: TrialConfig, storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = prepared(trial, storage)
    paths = [tables.images, tables.backbone, tables.evaluation, tables.views, tables.features]
    sound = [path.read_bytes() for path in paths if path]
    for path, content in zip(paths, sound, strict=True):
        assert path
        path.write_bytes(content[: len(content) // 2])
    assert prepared(trial, storage) == tables
    assert [path.read_bytes() for path in paths if path] == sound
    assert [str(path) in text for path, text in zip(paths, caplog.messages, strict=True)] == (
        [True] * 5
    )


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
    prepared(trial, storage, first)
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
