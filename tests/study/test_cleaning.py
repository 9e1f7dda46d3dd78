"""What of a study may be deleted, on studies that were written without training."""

from __future__ import annotations

from pathlib import Path

import pytest

from drtune_ray.results.trials import TrialSummary, best_first
from drtune_ray.storage.record import TRIALS_FOLDER
from drtune_ray.study.cleaning import clean, removable_files
from drtune_ray.study.status import read_trials
from tests.results.made_studies import made_study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return made_study(tmp_path / "flowers", 8).folder


@pytest.fixture
def ranked(study: Path) -> list[TrialSummary]:
    return [t for t in best_first(read_trials(study)) if t.reference != "ce_tuning"]


def write(study: Path, name: str, num_bytes: int) -> Path:
    file = study / TRIALS_FOLDER / name / "best.ckpt"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(num_bytes))
    return file


def test_clean__trainings_after_the_search_of_trials_that_cannot_win(
    study: Path, ranked: list[TrialSummary]
) -> None:
    best, worst = f"{ranked[0].number:05d}", f"{ranked[-1].number:05d}"
    kept = [write(study, f"{kind}{best}", 10) for kind in ("", "final-fit-", "again-")]
    trial = write(study, worst, 100)
    later = [
        write(study, f"{kind}-{worst}", size) for kind, size in (("final-fit", 7), ("again", 5))
    ]
    of_trials, of_later = removable_files(str(study), "", cache=False)
    assert of_trials.paths == (trial.parent,) and of_trials.num_bytes == 100
    assert set(of_later.paths) == {file.parent for file in later} and of_later.num_bytes == 12
    assert "2 final fits or repetitions" in of_later.what
    assert clean(str(study), "", cache=False) == (of_trials, of_later)
    assert not trial.exists() and not any(file.exists() for file in later)
    assert all(file.exists() for file in kept)
    assert removable_files(str(study), "", cache=False) == ()


def test_clean__a_final_fit_alone(study: Path, ranked: list[TrialSummary]) -> None:
    """Also where the checkpoints of its trial were deleted before."""
    write(study, f"final-fit-{ranked[-1].number:05d}", 3)
    (found,) = removable_files(str(study), "", cache=False)
    assert found.num_bytes == 3
