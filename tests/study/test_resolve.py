"""Defaults of a study that has begun: those of its record, not those of the present machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from drtune_ray.config.study import STUDY, TRAINING
from drtune_ray.storage.record import RECORD_FILE, Record
from drtune_ray.study.checks import space_content
from drtune_ray.study.machine import Machine
from drtune_ray.study.resolve import Place, study_request, training_name, trial_request
from drtune_ray.values import to_yaml
from tests.conftest import WriteImages, noise_image

NO_SETTINGS = "{config: 3, kind: study, study_id: i, deciding: {}, tracking: {}}"
WITH_GPUS = Machine(8, 2)


@pytest.fixture
def images(write_images: WriteImages) -> Path:
    return write_images({"cat": 12, "dog": 12, "owl": 12})


def flags_of(images: Path, **more: Any) -> dict[str, Any]:
    return {"data_folder": str(images), "storage": str(images.parent / "studies"), **more}


def begin(images: Path, **more: Any) -> Record:
    """Record a study as `run_study` does when it begins."""
    config, _ = study_request(None, [], flags_of(images, **more))
    values = config.model_copy(update={"space": space_content(config)}).to_mapping()
    config.folder.mkdir(parents=True)
    record = Record(config.folder, "images-0", STUDY, values, {}, {})
    record.write()
    return record


def test_study_request__more_images_are_no_other_batch_size(images: Path) -> None:
    began = begin(images).config["trial"]
    assert began["training"]["batch_size"] == 8
    for number in range(30):
        noise_image(f"new{number}", 24).save(images / "cat" / f"new{number}.png")
    elsewhere, _ = study_request(None, [], flags_of(images, name="another"))
    assert elsewhere.trial.training.batch_size == 32
    config, notes = study_request(None, [], flags_of(images))
    assert config.trial.training.batch_size == 8
    assert "trial.training.batch_size=8" in notes[0]
    assert notes[0].startswith("Recorded when it began: ")


def test_study_request__the_same_command_on_another_machine(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = begin(images)
    monkeypatch.setattr("drtune_ray.study.resolve.this_machine", lambda: WITH_GPUS)
    config, notes = study_request(None, [], flags_of(images))
    there = record.config
    assert config.trials == there["trials"] == 12
    assert config.space == there["space"]
    found = config.to_mapping()["trial"]
    for group, key in (
        ("backbone", "name"),
        ("backbone", "weights"),
        ("data", "image_size"),
        ("training", "epochs"),
        ("training", "batch_size"),
    ):
        assert found[group][key] == there["trial"][group][key]
    # Where it runs is chosen for the machine at hand.
    assert config.resources.gpus_per_worker == 1.0
    assert config.trial.data.loader_workers == 3
    assert notes[1].startswith("Defaults for this machine (8 CPUs and 2 GPUs): ")
    assert "gpus_per_worker" in notes[1] and "epochs" not in notes[1]


def test_study_request__what_is_given_comes_before_the_record(images: Path, tmp_path: Path) -> None:
    begin(images, epochs=3, trials=20)
    assert study_request(None, [], flags_of(images))[0].trial.training.epochs == 3
    config, notes = study_request(None, ["training.batch_size=4"], flags_of(images, epochs=5))
    assert (config.trial.training.epochs, config.trial.training.batch_size) == (5, 4)
    assert config.trials == 20
    assert "epochs" not in notes[0] and "trials=20" in notes[0]
    space = {"parameters": {"optim.backbone_lr": {"float": [0.001, 0.01]}}}
    file = tmp_path / "study.yaml"
    file.write_text(to_yaml({"space": space}))
    assert study_request(file, [], flags_of(images))[0].space == space


def test_study_request__the_record_in_the_artifacts(images: Path, tmp_path: Path) -> None:
    """A driver on a new machine has an empty disk."""
    record = begin(images, epochs=3)
    (tmp_path / "bucket").mkdir()
    shutil.move(record.folder, tmp_path / "bucket" / record.folder.name)
    assert study_request(None, [], flags_of(images))[0].trial.training.epochs == 8
    there = flags_of(images, artifacts=f"file://{tmp_path}/bucket")
    assert study_request(None, [], there)[0].trial.training.epochs == 3
    nowhere = flags_of(images, artifacts=f"file://{tmp_path}/nowhere")
    assert study_request(None, [], nowhere)[0].trial.training.epochs == 8


@pytest.mark.parametrize("content", ["", "kind: study", "[", NO_SETTINGS])
def test_study_request__a_damaged_record_is_left_to_the_study(images: Path, content: str) -> None:
    (begin(images, epochs=3).folder / RECORD_FILE).write_text(content)
    assert study_request(None, [], flags_of(images))[0].trial.training.epochs == 8


def test_trial_request__a_training_that_has_begun(images: Path) -> None:
    storage = images.parent / "studies"
    place, flags = Place(str(storage)), {"data_folder": str(images)}
    config, _, _ = trial_request(None, [], flags | {"epochs": 3}, place)
    folder = storage / training_name(images)
    folder.mkdir(parents=True)
    Record(folder, "one-0", TRAINING, config.to_mapping(), {}, {}).write()
    for number in range(30):
        noise_image(f"new{number}", 24).save(images / "cat" / f"new{number}.png")
    again, _, notes = trial_request(None, [], flags, place)
    assert (again.training.epochs, again.training.batch_size) == (3, 8)
    assert notes[0].startswith("Recorded when it began: ")
    other, _, _ = trial_request(None, [], flags, Place(str(storage), "other"))
    assert (other.training.epochs, other.training.batch_size) == (8, 32)


def test_study_request__counts_images_by_content(write_images: WriteImages) -> None:
    root = write_images({"cat": 2, "dog": 2})
    for name in ("cat", "dog"):
        for number in range(40):
            noise_image(f"{name}{number}", 24).save(root / name / f"{number}", "PPM")
        (root / name / ".hidden").mkdir()
    assert study_request(None, [], flags_of(root))[0].trial.training.batch_size == 32
