from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import drtune_ray
from drtune_ray.config.study import STUDY, TRAINING, StudyConfig, TrackingConfig
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.space.search_space import read_space
from drtune_ray.storage.driver_lock import driver_lock
from drtune_ray.storage.fingerprint import NUMERIC_VERSION, deciding_values, open_record
from drtune_ray.storage.record import (
    RECORD_FILE,
    Record,
    find_study,
    read_record,
)
from drtune_ray.values import flattened, nested, read_yaml

DRIVER = """
import sys, time
from pathlib import Path
from drtune_ray.storage.driver_lock import driver_lock
with driver_lock(Path(sys.argv[1])):
    print("driving", flush=True)
    time.sleep(60)
"""


def config(folder: Path, values: dict[str, Any] | None = None) -> StudyConfig:
    return StudyConfig.from_mapping(
        nested(
            {
                "name": folder.name,
                "storage": str(folder.parent),
                "trial.data.train": "images",
                "space": read_space("dr_tune"),
                "trial.optim.weight_decay": 1e-6,
            }
            | (values or {})
        )
    )


def opened(
    folder: Path,
    values: dict[str, Any] | None = None,
    data: str = "data hash",
    weights: str = "weights hash",
) -> Record:
    study = config(folder, values)
    plain = study.to_mapping()
    return open_record(folder, STUDY, plain, deciding_values(plain, data, weights), study.tracking)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "flowers"
    path.mkdir()
    return path


# ---- what a study is


def test_open_record__new(folder: Path) -> None:
    record = opened(folder)
    assert re.fullmatch(r"flowers-[0-9a-f]{12}", record.study_id)
    assert (record.folder, record.kind) == (folder, STUDY)
    assert read_record(folder) == record
    assert read_yaml(folder / RECORD_FILE)["drtune_ray_version"] == drtune_ray.__version__
    assert StudyConfig.from_mapping(record.config) == config(folder)
    assert TrackingConfig(**record.tracking) == TrackingConfig()
    assert sorted(path.name for path in folder.iterdir()) == [RECORD_FILE]


def test_open_record__same_configuration_reopens(folder: Path) -> None:
    first = opened(folder)
    assert opened(folder) == first


def test_open_record__two_studies_have_two_identities(tmp_path: Path) -> None:
    for name in ("one/flowers", "two/flowers"):
        (tmp_path / name).mkdir(parents=True)
    records = [opened(tmp_path / name) for name in ("one/flowers", "two/flowers")]
    assert records[0].study_id != records[1].study_id


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trials", 40),
        ("resources.trials_at_a_time", 3),
        ("resources.gpus_per_worker", 0.5),
        ("tracking.uri", "http://mlflow:5000"),
        ("trial.data.train", "/mnt/images"),
        ("trial.data.loader_workers", 2),
        ("trial.data.skip_bad", True),
        ("trial.data.cache_limit_gib", 1.0),
        ("trial.backbone.weights", "/mnt/weights.pth"),
        ("trial.backbone.weights_key", "ema"),
        ("trial.backbone.allow_missing", True),
        ("trial.training.save_every_seconds", 30.0),
        ("resources.gpus_per_trial", 0.25),
        ("resources.wait_seconds", 60.0),
    ],
)
def test_open_record__budgets_and_places_may_change(folder: Path, path: str, value: Any) -> None:
    first = opened(folder)
    second = opened(folder, {path: value})
    assert second.study_id == first.study_id
    assert second.deciding == first.deciding
    # They are recorded all the same.
    assert flattened(read_record(folder).config)[path] == value
    if path == "tracking.uri":
        assert read_record(folder).tracking["uri"] == value


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("seed", 0, 7),
        ("trial.seed", 0, 7),
        ("trial.training.epochs", 10, 20),
        ("trial.method.bank_size", 512, 64),
        ("trial.method.calibration.rotation", True, False),
        ("trial.optim.weight_decay", 1e-6, 1e-5),
        ("trial.data.view_seed", 0, 1),
        ("trial.data.train_per_class", None, 10),
        ("trial.backbone.name", "tf_efficientnet_lite0", "resnet18"),
        ("sampler.name", "tpe", "random"),
        ("scheduler.reduction_factor", 3.0, 4.0),
        (
            "reference_trials",
            ["default", "ce_tuning", "authors"],
            ["ce_tuning"],
        ),
    ],
)
def test_open_record__what_decides_the_results_may_not_change(
    folder: Path, path: str, before: Any, after: Any
) -> None:
    opened(folder)
    written = (folder / RECORD_FILE).read_text()
    with pytest.raises(ConfigError) as caught:
        opened(folder, {path: after})
    assert str(caught.value) == (
        f"the name 'flowers' under {folder.parent} is taken by another configuration; give this "
        "one another --name, or repeat the former command:\n"
        f"  {path}: {before!r} there, {after!r} here"
    )
    assert (folder / RECORD_FILE).read_text() == written


def test_open_record__normalization_may_not_change(folder: Path) -> None:
    before = opened(folder).deciding
    # As in the records of earlier versions, which had no such settings.
    assert not [
        path for path in before if path.startswith(("trial.backbone.m", "trial.backbone.s"))
    ]
    given = {"trial.backbone.mean": [0.4] * 3, "trial.backbone.std": [0.2] * 3}
    with pytest.raises(ConfigError) as caught:
        opened(folder, given)
    assert str(caught.value).splitlines()[1:] == [
        "  trial.backbone.mean: None there, [0.4, 0.4, 0.4] here",
        "  trial.backbone.std: None there, [0.2, 0.2, 0.2] here",
    ]


@pytest.mark.parametrize(("first", "second"), [(2, 4), (3, 2)])
def test_open_record__several_workers_may_become_other_several(
    folder: Path, first: int, second: int
) -> None:
    before = opened(folder, {"trial.training.workers": first})
    assert opened(folder, {"trial.training.workers": second}).deciding == before.deciding


@pytest.mark.parametrize(("first", "second"), [(1, 2), (4, 1)])
def test_open_record__a_study_does_not_change_between_one_worker_and_several(
    folder: Path, first: int, second: int
) -> None:
    """Of several, the authors' reference trial would see BatchNorm statistics of a part."""
    opened(folder, {"trial.training.workers": first})
    with pytest.raises(ConfigError) as caught:
        opened(folder, {"trial.training.workers": second})
    assert str(caught.value).splitlines()[1:] == [
        f"  several workers a trial: {first > 1} there, {second > 1} here (training.workers may "
        "change, but not between 1 and more than 1)"
    ]


def test_open_record__a_training_may_resume_on_any_number_of_workers(folder: Path) -> None:
    ids = set()
    for workers in (1, 3, [1, 2]):
        trial = config(folder).trial.with_values({"training.workers": workers}).to_mapping()
        deciding = deciding_values(trial, "data hash", "weights hash")
        ids.add(open_record(folder, TRAINING, trial, deciding, TrackingConfig()).study_id)
    assert len(ids) == 1


def test_open_record__every_difference_is_shown(folder: Path) -> None:
    opened(folder)
    space = read_space("dr_tune")
    space["parameters"]["method.bank_size"] = {"int": [32, 64]}
    with pytest.raises(ConfigError) as caught:
        opened(folder, {"space": space, "seed": 3}, data="other images", weights="other weights")
    assert str(caught.value).splitlines()[1:] == [
        "  content of the images and splits: 'data hash' there, 'other images' here",
        "  content of the pretrained weights: 'weights hash' there, 'other weights' here",
        "  seed: 0 there, 3 here",
        "  space.parameters.method.bank_size.int: [32, 8192] there, [32, 64] here",
        "  space.parameters.method.bank_size.log: True there, None here",
    ]


def test_open_record__numeric_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(folder)
    monkeypatch.setattr("drtune_ray.storage.fingerprint.NUMERIC_VERSION", 99)
    change = f"numeric version of drtune-ray: {NUMERIC_VERSION} there, 99 here"
    with pytest.raises(ConfigError, match=change):
        opened(folder)


def test_open_record__a_training_of_this_name(folder: Path) -> None:
    trial = config(folder).trial.to_mapping()
    deciding = deciding_values(trial, "data hash", "weights hash")
    assert not {"data.train", "backbone.weights", "data.loader_workers"} & deciding.keys()
    assert {"data.image_size", "backbone.name", "training.epochs"} <= deciding.keys()
    open_record(folder, TRAINING, trial, deciding, TrackingConfig())
    with pytest.raises(ConfigError) as caught:
        opened(folder)
    assert str(caught.value).splitlines()[1:] == ["  it is a training, this is a study"]


# ---- finding one


def test_read_record__none(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_record(folder)
    assert str(caught.value) == f"{folder} is not a study: it holds no study.yaml"


def test_read_record__another_file_of_that_name(folder: Path) -> None:
    # BUG found: KeyError 'study_id'. A user may well keep his own configuration as study.yaml in
    # a folder of the study's name under the storage.
    (folder / RECORD_FILE).write_text("name: flowers\ntrials: 20\n")
    with pytest.raises(ConfigError, match=re.escape(str(folder))):
        read_record(folder)


def test_find_study__by_name_and_by_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(folder)
    monkeypatch.chdir(folder.parent)
    assert find_study("flowers", str(folder.parent)) == folder
    assert find_study(str(folder), "nowhere") == folder
    assert find_study("flowers", "nowhere") == folder  # relative to where one stands


def test_find_study__names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_study("roses", str(tmp_path))
    assert str(caught.value) == (
        f"there is no study 'roses' under {tmp_path}: give its name and --storage, or its folder"
    )
    for name in ("tulips", "flowers"):
        (tmp_path / name).mkdir()
        opened(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        find_study("roses", str(tmp_path))
    assert str(caught.value) == (
        f"there is no study 'roses' under {tmp_path}; there are ['flowers', 'tulips']: give its "
        "name and --storage, or its folder"
    )


# ---- one driver


@pytest.fixture
def driver(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that drives the study."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "driving\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_driver_lease__second_driver_is_refused_until_the_first_is_killed(
    folder: Path, driver: subprocess.Popen[str]
) -> None:
    with pytest.raises(EnvironmentProblem) as caught, driver_lock(folder):
        pass
    assert str(caught.value) == (
        f"study 'flowers' is being run by process {driver.pid} on {socket.gethostname()}: wait "
        "for it or end it first"
    )
    driver.kill()  # -9: no handler, no finally
    driver.wait()
    with driver_lock(folder):
        holder = (folder / "driver.txt").read_text()
    assert holder == f"process {os.getpid()} on {socket.gethostname()}"


def test_driver_lease__within_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "flowers"
    with driver_lock(folder):
        with pytest.raises(EnvironmentProblem), driver_lock(folder):
            pass
        with driver_lock(tmp_path / "roses"):  # another study
            pass
    with driver_lock(folder):
        pass


def test_driver_lease__is_free_after_an_error(folder: Path) -> None:
    with pytest.raises(KeyError), driver_lock(folder):
        raise KeyError
    with driver_lock(folder):
        pass
