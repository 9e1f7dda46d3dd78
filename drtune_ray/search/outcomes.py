"""The "tell" of a study beside the "ask" of `proposals`: what Optuna records of a trial.

Ray's own OptunaSearch tells the sampler that a trial stopped early is a finished one and leaves
diverged ones RUNNING; here the study records what happened:

    finished, or stopped by its own patience,     COMPLETE  with its best value
    or at the study's target
    stopped by the scheduler or the budget        PRUNED    with its best values by epoch
    diverged or out of memory, because of the     PRUNED    with a violated constraint, so that
    point                                                   the sampler avoids it
    the machine's fault                           FAIL      with what the machine did
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from drtune_ray.config.metric import METRICS
from drtune_ray.results import trials
from drtune_ray.search.budget import REACHED_TARGET, STOPPED_BY_BUDGET, Budget
from drtune_ray.search.objectives import final_values
from drtune_ray.training.reports import (
    COMPLETED,
    NUM_THREADS,
    OBJECTIVE,
    OF_SETTINGS,
    OUTCOME,
    PATIENCE,
    result_history,
)

STOPPED_BY_SCHEDULER = "stopped by the scheduler"
CONSTRAINT = "trains"


class Outcomes:
    """Records values and end states of trials in their Optuna study.

    Args:
        study: The study.
        budget: Asked why a trial was stopped; None where only its own end stops one.
        objectives: Names of the objectives; the first is the metric that chooses.
        costs: Costs of the classifiers by `TrialConfig.tables_key`; see `training.complexity`.
    """

    def __init__(
        self,
        study: optuna.Study,
        budget: Budget | None = None,
        objectives: tuple[str, ...] = ("val_accuracy",),
        costs: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self._study, self._budget = study, budget
        self._objectives, self._costs = objectives, costs or {}
        self._metric = METRICS[objectives[0]]
        self._reported: dict[int, set[int]] = {
            trial.number: set(trials.values_by_epoch(trial))
            for trial in study.get_trials(deepcopy=False)
        }

    def report(self, trial: Trial, result: dict[str, Any]) -> None:
        """Record the best value so far of each epoch that was not recorded yet."""
        reported = self._reported.setdefault(trial.number, set())
        for record in result_history(result):
            if record.epoch not in reported:
                trials.record_value(trial, record.epoch, record.metrics[self._metric.best])
                reported.add(record.epoch)

    def tell(self, trial: Trial, result: dict[str, Any]) -> None:
        """Record the end state of a trial by its last result."""
        self.report(trial, result)
        outcome = result[OUTCOME] or self._why_stopped(result)
        trial.set_user_attr(NUM_THREADS, result[NUM_THREADS])
        if "hostname" in result:  # as Tune adds it
            trial.set_user_attr(trials.HOST, result["hostname"])
        if outcome in OF_SETTINGS:
            self._end(trial, TrialState.PRUNED, outcome, violation=1.0)
        elif outcome in (COMPLETED, PATIENCE, REACHED_TARGET) and math.isfinite(result[OBJECTIVE]):
            self._end(trial, TrialState.COMPLETE, outcome, values=self._values(trial, result))
        else:
            self._end(trial, TrialState.PRUNED, outcome)

    def tell_failure(self, trial: Trial, outcome: str) -> None:
        """Record that the machine failed a trial, and how."""
        self._end(trial, TrialState.FAIL, outcome)

    def _why_stopped(self, result: dict[str, Any]) -> str:
        """Return why a trial was stopped that did not end by itself."""
        if self._budget is not None and self._budget.has_reached_target(result):
            return REACHED_TARGET
        if self._budget is not None and self._budget.hard_end() is not None:
            return STOPPED_BY_BUDGET
        return STOPPED_BY_SCHEDULER

    def _end(
        self,
        trial: Trial,
        state: TrialState,
        outcome: str,
        *,
        values: list[float] | None = None,
        violation: float = 0.0,
    ) -> None:
        trial.set_user_attr(trials.OUTCOME, outcome)
        # It may be there already: from a driver that was cut off behind it.
        if state != TrialState.FAIL and CONSTRAINT not in trial.constraints:
            trial.set_constraint(CONSTRAINT, violation)
        self._study.tell(trial, values, state=state)

    def _values(self, trial: Trial, result: dict[str, Any]) -> list[float]:
        """Return the value of each objective at the best epoch."""
        if len(self._objectives) == 1:
            return [float(result[OBJECTIVE])]
        costs = self._costs.get(trials.config_of(trial).tables_key, {})
        values = final_values(self._objectives, result, costs)
        named = dict(zip(self._objectives, values, strict=True))
        trial.set_user_attr(trials.OBJECTIVES, named)
        return values
