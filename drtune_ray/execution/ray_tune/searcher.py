"""StudySearch: Ray Tune's searcher over an Optuna study, which is the truth.

A trial is known by its Optuna number. Ray's own OptunaSearch tells the sampler that a trial
stopped early is a finished one and leaves diverged ones RUNNING; this one tells what happened:

    finished, or stopped by its own patience,     COMPLETE  with its best value
    or at the study's target
    stopped by the scheduler or the budget        PRUNED    with its best values by epoch
    diverged or out of memory, because of the     PRUNED    with a violated constraint, so that
    point                                                   the sampler avoids it
    the machine's fault                           FAIL      with what the machine did
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from optuna.trial import Trial, TrialState
from ray.tune.search import Searcher

from drtune_ray.config.trial import TrialConfig
from drtune_ray.results import trials
from drtune_ray.search.budget import REACHED_TARGET, STOPPED_BY_BUDGET, Budget
from drtune_ray.search.objectives import final_values
from drtune_ray.search.outcomes import CONSTRAINT, STOPPED_BY_SCHEDULER
from drtune_ray.search.proposals import Proposals
from drtune_ray.training.reports import (
    COMPLETED,
    CONFIG_NUMBER,
    CONFIG_TRIAL,
    DIVERGED,
    NUM_THREADS,
    OBJECTIVE,
    OUT_OF_MEMORY,
    OUTCOME,
    PATIENCE,
    result_history,
)


class StudySearch(Searcher):  # type: ignore[misc]
    """Hands Tune one trial after another and tells Optuna what became of each.

    Args:
        proposals: Which trial is next.
        budget: Asked why a trial was stopped; None where nothing but its own end stops one.
        objectives: What is optimised; the first is the validation accuracy.
        costs: Of the classifiers, by `TrialConfig.tables_key`; see `training.complexity`.
    """

    def __init__(
        self,
        proposals: Proposals,
        budget: Budget | None = None,
        objectives: tuple[str, ...] = ("val_accuracy",),
        costs: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self.study, self.proposals, self._budget = proposals.study, proposals, budget
        self._objectives, self._costs = objectives, costs or {}
        self._end: Exception | None = None
        self._active: dict[str, Trial] = {}
        self._reported: dict[int, set[int]] = {
            trial.number: set(trials.values_by_epoch(trial))
            for trial in self.study.get_trials(deepcopy=False)
        }

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes it to disks, and the address of the storage holds a password."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial as Tune's config, or FINISHED."""
        trial = self.proposals.next()
        if trial is None:
            return str(Searcher.FINISHED)
        self._active[trial_id] = trial
        return {CONFIG_NUMBER: trial.number, CONFIG_TRIAL: trial.user_attrs[trials.CONFIG]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record the best value so far, by epoch."""
        if trial := self._active.get(trial_id):
            self._report(trial, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna what became of the trial; without a word of it, it stays unfinished.

        Of an error Tune says here no more than that there was one: see `fail`.
        """
        if error or not result or trial_id not in self._active or self._end is not None:
            return
        trial = self._active[trial_id]
        with self._error_kept():
            self._report(trial, result)
            self._tell_outcome(trial, result)
            del self._active[trial_id]

    def fail(self, trial_id: str, outcome: str) -> None:
        """Tell Optuna that the machine failed a trial for the last time, and how.

        After `end_with` it stays unfinished.
        """
        if self._end is not None:
            return
        if trial := self._active.pop(trial_id, None):
            with self._error_kept():
                self._tell(trial, TrialState.FAIL, outcome)

    def end_with(self, error: Exception) -> None:
        """End the study at the next `check_storage`; no trial is told to Optuna any more."""
        self._end = error

    def check_storage(self) -> None:
        """To be called where an error ends the study.

        Raises:
            Exception: Of `end_with`; or what Optuna's storage raised before, where Tune would
                have taken it for an error of the trial.
        """
        if self._end is not None:
            raise self._end

    @contextlib.contextmanager
    def _error_kept(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # for `check_storage`
            self._end = error

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: Optuna's storage holds everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def _report(self, trial: Trial, result: dict[str, Any]) -> None:
        reported = self._reported.setdefault(trial.number, set())
        for record in result_history(result):
            if record.epoch not in reported:
                trials.record_value(trial, record.epoch, record.metrics[OBJECTIVE])
                reported.add(record.epoch)

    def _tell_outcome(self, trial: Trial, result: dict[str, Any]) -> None:
        outcome = result[OUTCOME] or self._why_stopped(result)
        value = float(result[OBJECTIVE])
        trial.set_user_attr(NUM_THREADS, result[NUM_THREADS])
        if outcome in (DIVERGED, OUT_OF_MEMORY):
            self._tell(trial, TrialState.PRUNED, outcome, violation=1.0)
        elif outcome in (COMPLETED, PATIENCE, REACHED_TARGET) and math.isfinite(value):
            self._tell(trial, TrialState.COMPLETE, outcome, values=self._values(trial, result))
        else:
            self._tell(trial, TrialState.PRUNED, outcome)

    def _why_stopped(self, result: dict[str, Any]) -> str:
        """Why Tune stopped a trial that did not end by itself."""
        if self._budget is not None and self._budget.has_reached_target(result):
            return REACHED_TARGET
        if self._budget is not None and self._budget.hard_end() is not None:
            return STOPPED_BY_BUDGET
        return STOPPED_BY_SCHEDULER

    def _tell(
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
        self.study.tell(trial, values, state=state)

    def _values(self, trial: Trial, result: dict[str, Any]) -> list[float]:
        """Of each objective, at the best epoch."""
        if len(self._objectives) == 1:
            return [float(result[OBJECTIVE])]
        config = TrialConfig.from_mapping(json.loads(trial.user_attrs[trials.CONFIG]))
        values = final_values(self._objectives, result, self._costs.get(config.tables_key, {}))
        named = dict(zip(self._objectives, values, strict=True))
        trial.set_user_attr(trials.OBJECTIVES, named)
        return values
