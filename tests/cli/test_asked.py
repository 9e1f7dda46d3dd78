from __future__ import annotations

from pathlib import Path

import pytest

from drtune_ray.config.section import unknown_name
from drtune_ray.config.sources import merged_study, read_settings
from drtune_ray.config.study import STUDY, TRAINING, StudyConfig
from drtune_ray.storage.record import RECORD_FILE, Record


def test_asked_study__record_of_a_study_is_a_study_file(tmp_path: Path) -> None:
    values = {"name": "flowers", "trials": 7, "trial": {"data": {"train": str(tmp_path)}}}
    config = StudyConfig.from_mapping(values).to_mapping()
    Record(tmp_path, "flowers-0", STUDY, config, {}, {}).write()
    asked = merged_study(tmp_path / RECORD_FILE, ["training.epochs=3"], {"name": "again"})
    assert asked["name"] == "again"
    assert asked["trial"]["training"]["epochs"] == 3
    assert StudyConfig.from_mapping(asked).trials == 7


def test_read_settings__record_of_a_training(tmp_path: Path) -> None:
    Record(tmp_path, "one-0", TRAINING, {"training": {"epochs": 3}}, {}, {}).write()
    assert read_settings(tmp_path / RECORD_FILE, TRAINING) == {"training": {"epochs": 3}}


def test_asked_study__a_folder_of_a_study_or_of_images(tmp_path: Path) -> None:
    images = tmp_path / "flowers"
    images.mkdir()
    asked = merged_study(images, [], {"trials": 5})
    assert (asked["name"], asked["trials"]) == ("flowers", 5)
    assert asked["trial"]["data"]["train"] == str(images)
    assert read_settings(images, TRAINING) == {"data": {"train": str(images)}}
    config = StudyConfig.from_mapping(asked).to_mapping()
    study = tmp_path / "study"
    Record(study, "flowers-0", STUDY, config, {}, {}).write()
    assert merged_study(study, [], {})["trials"] == 5


def test_asked_study__key_of_a_record_in_a_study_file(tmp_path: Path) -> None:
    # One of the two keys of a record is not enough to be taken for one.
    file = tmp_path / "study.yaml"
    file.write_text("config: {}\ntrial: {data: {train: images}}\n")
    assert "config" in merged_study(file, [], {})


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("data.qqqqqqqqqqqqqqqqqqqq", ["data.image_size", "data.train"]),
        ("data.qqqqqqqqqqqqqqqqqqqq.qq", ["data.image_size", "data.train"]),
        ("zzz", ["data", "seed"]),
        ("elsewhere.zzz", ["data", "seed"]),
    ],
)
def test_unknown_name__shows_the_names_beside_it(name: str, valid: list[str]) -> None:
    known = ["data", "data.image_size", "data.train", "seed"]
    assert unknown_name("key", name, known) == f"unknown key {name!r}; valid are {valid}"
