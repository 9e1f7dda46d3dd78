"""A trial repeated: what is taken from its study, and what is said of the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drtune_ray.config.metric import METRICS
from drtune_ray.config.trial import deciding_settings
from drtune_ray.display.repeated import repeated_facts, repeated_lines
from drtune_ray.errors import ConfigError
from drtune_ray.study.repeat import Original, original_trial
from drtune_ray.study.status import read_trials
from drtune_ray.study.training_run import TrainingResult
from drtune_ray.training.loop import train_epochs
from tests import past_studies
from tests.results.made_studies import made_study
from tests.small import prepared


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return past_studies.install(tmp_path)


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """Without what a trial of an earlier version lacks, at the values that it then had."""
    return deciding_settings(config, ())


def test_original_trial__is_what_the_study_recorded(study: Path) -> None:
    for trial in read_trials(study):
        found = original_trial(f"small:{trial.number}", str(study.parent), {"--epochs": None}, ())
        assert deciding(found.config.to_mapping()) == deciding(trial.config)
        assert (found.metric, found.value) == (trial.metric, trial.best_value)
        assert (found.name, found.storage) == (f"small-trial-{trial.number}", str(study.parent))
        assert original_trial(f"{study}:{trial.number}", "", {}, ()) == found
    with pytest.raises(ConfigError, match=r"small has no trial 9 with a result: it has \[0, 1\]"):
        original_trial("small:9", str(study.parent), {}, ())


def test_original_trial__its_figure_comes_again(study: Path) -> None:
    """Trained here as `train` does on a worker, with the splits of the study."""
    found = original_trial("small:1", str(study.parent), {}, ())
    data, backbone, _ = prepared(found.config, study.parent)
    reports = list(train_epochs(found.config, data, backbone, num_threads=1))
    history = reports[-1].history
    assert found.came_again(max(epoch.metrics["val_accuracy"] for epoch in history))


def test_original_trial__of_a_study_by_another_metric(tmp_path: Path) -> None:
    made = made_study(tmp_path / "flowers", 6, objectives=["log_loss"])
    stopped = next(trial for trial in read_trials(made.folder) if trial.state == "PRUNED")
    found = original_trial(f"{made.folder}:{stopped.number}", "", {}, ())
    assert (found.metric, found.value) == (METRICS["log_loss"], stopped.best_value)
    assert found.config.training.metric == "log_loss"
    assert found.config.training.last_epoch == stopped.num_epochs < found.config.training.epochs


def result(study: Path, value: float, metric: str = "val_accuracy") -> TrainingResult:
    return TrainingResult(study, 0.4, METRICS[metric], value, "completed", 0, False)


def test_repeated__what_is_said(study: Path) -> None:
    found = original_trial("small:0", str(study.parent), {}, ())
    found = replace(found, value=0.5)
    (line,) = repeated_lines(found, result(study, 0.5))
    assert line == "Trial 0 of small had 50.00 % (validation accuracy): the same figure came again"
    (line,) = repeated_lines(found, result(study, 0.25))
    assert "the repetition differs by -25.00 points;" in line
    assert repeated_facts(found, result(study, 0.25))["repeats"]["came_again"] is False
    loss = replace(found, metric=METRICS["log_loss"])
    (line,) = repeated_lines(loss, result(study, 0.75, "log_loss"))
    assert "had 0.5000 (log loss on the validation images): the repetition differs by +0.25" in line
    facts = {"metric": "val_loss", "best_val_loss": 0.5, "came_again": True}
    repeats = repeated_facts(loss, result(study, 0.5, "log_loss"))["repeats"]
    assert repeats == {"study": "small", "trial": 0} | facts
    nothing: Original | None = None
    assert not list(repeated_lines(nothing, result(study, 0.5)))
    assert repeated_facts(nothing, result(study, 0.5)) == {}
