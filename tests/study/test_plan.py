"""What `tune` and `train` say of the images before they train."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from drtune_ray.config.study import StudyConfig
from drtune_ray.display.result import plan_lines
from drtune_ray.execution.capacity import Capacity
from drtune_ray.study.checks import check_study
from drtune_ray.study.result import SEARCH, StudyPlan
from drtune_ray.study.training_run import run_training
from drtune_ray.values import nested
from tests.small import BACKBONE, small_trial, small_values


@pytest.fixture
def values(class_folder: Path, weights_file: Callable[[str], Path]) -> dict[str, Any]:
    """Settings of a trial on images one of which lies in both classes, and one is no image."""
    shutil.copy(class_folder / "cat" / "000.png", class_folder / "dog" / "copy.png")
    (class_folder / "dog" / "notes.txt").write_text("a dog")
    return small_values(class_folder, weights_file, BACKBONE)


def expected(notes: list[str]) -> bool:
    """Whether the notes tell of the images, in this order."""
    starts = ("2 classes; 13 to train, ", "images per class: cat 10, dog 11", "1 file left out: ")
    several = "1 picture lies in several classes (cat/000.png = dog/copy.png)"
    return all(map(str.startswith, notes, (*starts, several)))


def test_plan_lines__of_a_study(values: dict[str, Any], tmp_path: Path) -> None:
    study = {"name": "one", "storage": str(tmp_path / "studies")}
    config = StudyConfig.from_mapping(study | {"trial": nested(values)})
    _, _, _, notes = check_study(config)
    assert expected(list(notes))
    lines = list(plan_lines(StudyPlan(config, SEARCH, 20, 0, 1, (), notes)))
    assert expected([line.strip() for line in lines[1:]])


def test_run_training__announces_its_images(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(training: Any) -> None:
        raise KeyboardInterrupt

    module = "drtune_ray.study.training_run"
    cluster = nullcontext(Capacity((), is_local=True))
    monkeypatch.setattr(f"{module}.ready_cluster", lambda *a, **k: cluster)
    monkeypatch.setattr(f"{module}._Training.run", interrupt)
    announced: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_training(small_trial(values), "one", tmp_path / "studies", on_plan=announced.extend)
    assert expected(announced)
