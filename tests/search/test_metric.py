"""Another first objective: the study's metric, its direction, and what goes by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from drtune_ray.config.metric import METRICS
from drtune_ray.config.study import BudgetConfig, FinalistsConfig, SchedulerConfig, StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.execution.ray_tune.schedulers import build_scheduler
from drtune_ray.results.trials import best_first, best_trial, describe, summaries, trials_table
from drtune_ray.search.budget import Budget
from drtune_ray.search.finalists import best_finalist, finalists
from drtune_ray.search.objectives import direction
from drtune_ray.search.outcomes import Outcomes
from drtune_ray.storage.optuna_storage import open_storage, open_study
from drtune_ray.training.reports import COMPLETED, OBJECTIVE
from tests.execution.test_scheduler import tune_trial
from tests.search.searches import result


def study_of(**values: Any) -> StudyConfig:
    trial = {"data": {"train": "images"}} | values.pop("trial", {})
    return StudyConfig.from_mapping({"name": "a", "trial": trial} | values)


def test_study__its_first_objective_is_the_metric_of_its_trials() -> None:
    config = study_of(objectives=["macro_f1", "flops"])
    assert config.trial.training.metric == "macro_f1"
    assert StudyConfig.from_mapping(config.to_mapping()) == config
    assert study_of(trial={"training": {"metric": "auroc"}}).objectives == ("auroc",)
    assert study_of().trial.training.metric == "val_accuracy"
    with pytest.raises(ConfigError, match="must be the first of the objectives"):
        study_of(objectives=["macro_f1"], trial={"training": {"metric": "auroc"}})


def test_metrics__their_directions() -> None:
    assert {name for name in METRICS if direction(name) == "minimize"} == {
        "log_loss",
        "calibration_error",
    }


LOSSES = [[0.9, 0.7], [0.8, 0.4], [0.6, 0.6], [0.9, 0.5]]  # by trial, by epoch


@pytest.fixture
def study(tmp_path: Path, make_trial: Any) -> optuna.Study:
    """Four trials by log loss."""
    study = open_study(open_storage(tmp_path, None, ["minimize"]), "a", ["minimize"])
    outcomes = Outcomes(study, objectives=("log_loss",))
    for losses in LOSSES:
        trial = study.ask()
        config = make_trial({"training.metric": "log_loss", "seed": trial.number})
        describe(trial, config)
        outcomes.tell(trial, result(losses, COMPLETED, "log_loss"))
    return study


def test_trials__the_lowest_loss_is_the_best(study: optuna.Study) -> None:
    trials = summaries(study.trials)
    assert [trial.best_value for trial in trials] == [0.7, 0.4, 0.6, 0.5]
    assert [trial.best_epoch for trial in trials] == [2, 2, 1, 2]
    assert study.best_trial.number == best_trial(trials).number == 1
    assert [trial.number for trial in best_first(trials)] == [1, 3, 2, 0]
    table = trials_table(trials)
    assert table["best_val_loss"].to_pylist() == [0.7, 0.4, 0.6, 0.5]
    assert "best_val_accuracy" not in table.column_names
    assert trials[0].best_val_accuracy is None
    assert trials[0].to_mapping()["best_val_loss"] == 0.7


def test_finalists__the_lowest_mean_wins_and_its_best_seed_is_shipped(study: optuna.Study) -> None:
    def finalist(number: int, *values: float) -> Any:
        repeated = [trials[2].__class__(**vars(trials[2])) for _ in values]
        runs = tuple(
            run.__class__(**(vars(run) | {"number": 9 + at, "best_value": value}))
            for at, (run, value) in enumerate(zip(repeated, values, strict=True))
        )
        return kind(trials[number], len(values), runs)

    trials = summaries(study.trials)
    chosen = finalists(trials, FinalistsConfig(num_configurations=2, num_seeds=1))
    assert [each.source.number for each in chosen] == [1, 3]
    kind = type(chosen[0])
    worse, better = finalist(1, 0.5, 0.9), finalist(3, 0.6, 0.5)
    assert best_finalist([worse, better]) is better
    assert better.best_run.best_value == 0.5


def test_budget__counts_trials_without_a_lower_loss(study: optuna.Study) -> None:
    def end(patience: int) -> str | None:
        config = BudgetConfig(patience_trials=patience)
        return Budget(9, config, study, metric=METRICS["log_loss"]).end(4)

    assert end(3) is None
    assert end(2) == "budget.patience_trials=2 trials in a row were no better than the best"


def test_scheduler__stops_the_high_losses() -> None:
    asha = build_scheduler(
        SchedulerConfig(min_epochs=1, reduction_factor=2), 4, set(), METRICS["log_loss"]
    )
    assert asha is not None
    decisions = []
    for number, loss in enumerate([0.5, 0.9, 0.4, math.inf]):
        asha.on_trial_add(None, tune_trial(number))
        told = {"epoch": 1, OBJECTIVE: loss}
        decisions.append(asha.on_trial_result(None, tune_trial(number), told))
    assert decisions == ["CONTINUE", "STOP", "CONTINUE", "STOP"]
