"""A search ends at whichever limit is met first, and goes on with what it has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from drtune_ray.config.study import BudgetConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.execution.ray_tune.searcher import StudySearch
from drtune_ray.results.trials import summaries
from drtune_ray.search.budget import REACHED_TARGET, STOPPED_BY_BUDGET, Budget
from drtune_ray.search.outcomes import STOPPED_BY_SCHEDULER
from drtune_ray.training.reports import COMPLETED
from tests.search.searches import opened, result, searching


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return opened(tmp_path)


@pytest.fixture
def base(make_trial: Any) -> TrialConfig:
    return make_trial({"method.bank_size": 32})


def told(search: StudySearch, *accuracies: float) -> None:
    """Trials of one epoch each, one after another."""
    for accuracy in accuracies:
        search.suggest("a")
        search.on_trial_complete("a", result([accuracy], COMPLETED))


def test_the_number_of_trials(study, base):
    search = searching(study, base, 2)
    told(search, 0.5, 0.6)
    assert search.suggest("b") == "FINISHED"
    assert search.proposals.end == "all 2 trials were begun"


def test_epochs_of_all_trials_together(study, base):
    search = searching(study, base, 9, budget={"max_epochs": 3})
    told(search, 0.5)
    search.suggest("b")
    search.on_trial_result("b", result([0.6]))
    budget = search.proposals._budget
    assert budget.end(2) is None and not budget.stops(result([0.6]))
    search.on_trial_result("b", result([0.6, 0.7]))
    assert budget.stops(result([0.6, 0.7]))
    search.on_trial_complete("b", result([0.6, 0.7]))
    assert study.trials[1].user_attrs["outcome"] == STOPPED_BY_BUDGET
    assert study.trials[1].state == TrialState.PRUNED
    assert search.suggest("c") == "FINISHED"
    assert search.proposals.end == "budget.max_epochs=3 were trained"


def test_a_trial_that_reaches_the_target_is_complete_and_ends_the_others(study, base):
    search = searching(study, base, 9, budget={"target_accuracy": 0.9})
    for name in ("a", "b", "c"):
        search.suggest(name)
    budget = search.proposals._budget
    assert not budget.stops(result([0.8]))
    search.on_trial_complete("a", result([0.8]))  # the scheduler's, before the target was reached
    assert budget.stops(result([0.95]))
    search.on_trial_complete("b", result([0.95]))
    assert budget.stops(result([0.1]))
    search.on_trial_complete("c", result([0.1]))
    outcomes = [(trial.outcome, trial.state) for trial in summaries(study.trials)]
    assert outcomes == [
        (STOPPED_BY_SCHEDULER, "PRUNED"),
        (REACHED_TARGET, "COMPLETE"),
        (STOPPED_BY_BUDGET, "PRUNED"),
    ]
    assert search.suggest("d") == "FINISHED"


def test_time_counts_over_all_runs_of_the_study(study):
    now = [100.0]
    config = BudgetConfig(max_seconds=60.0)
    first = Budget(9, config, study, lambda: now[0])
    now[0] += 50
    assert first.end(0) is None  # and written down
    again = Budget(9, config, study, lambda: now[0])
    now[0] += 9
    assert again.hard_end() is None
    now[0] += 1
    assert again.end(0) == "budget.max_seconds=60 are over"
    assert again.stops(result([0.5]))


@pytest.mark.parametrize(
    "accuracies, ends", [((0.5, 0.6, 0.5, 0.6), True), ((0.5, 0.6, 0.5, 0.7), False)]
)
def test_no_progress_for_some_trials(study, base, accuracies, ends):
    search = searching(study, base, 9, budget={"patience_trials": 2})
    told(search, *accuracies)
    assert (search.suggest("b") == "FINISHED") is ends
    if ends:
        assert "patience_trials=2 trials in a row" in search.proposals.end


def test_no_limit_but_the_trials_by_default(study, base):
    search = searching(study, base, 4)
    told(search, 1.0, 0.0, 0.0)
    assert search.suggest("b") != "FINISHED"
