"""The limits of a search: trials, epochs, time, a target accuracy, or no progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric
from drtune_ray.config.study import BudgetConfig
from drtune_ray.results import trials
from drtune_ray.training.reports import OBJECTIVE

SECONDS = "seconds"  # user attribute of the Optuna study: what its searches took so far
STOPPED_BY_BUDGET, REACHED_TARGET = "stopped by the budget", "reached the target accuracy"


class Budget:
    """Ends the search at the first limit that is reached.

    The number of trials and `patience_trials` only keep new trials from starting; the other limits
    also stop running trials at the end of their epoch. Everything is read from the Optuna study, so
    that an interrupted search resumes with the rest of its budget.

    Args:
        num_trials: Number of trials of the study, reference trials included.
        config: The other limits.
        study: The Optuna study.
        clock: Monotonic clock in seconds.
        metric: Metric of the values of the trials.
    """

    def __init__(
        self,
        num_trials: int,
        config: BudgetConfig,
        study: optuna.Study,
        clock: Callable[[], float] = time.monotonic,
        metric: Metric = METRICS[DEFAULT_METRIC],
    ) -> None:
        self._num_trials, self._config, self._study = num_trials, config, study
        self._metric = metric
        self._clock, self._started = clock, clock()
        self._seconds_before = float(study.user_attrs.get(SECONDS, 0.0))

    def stops(self, result: dict[str, Any]) -> bool:
        """Return whether to stop a trial at the epoch of this result."""
        return self.has_reached_target(result) or self.hard_end() is not None

    def end(self, num_begun: int) -> str | None:
        """Return why no further trial starts after `num_begun` trials; None while one may."""
        self.keep_time()
        if num_begun >= self._num_trials:
            return f"all {self._num_trials} trials were begun"
        return self.hard_end() or self._without_progress()

    def hard_end(self) -> str | None:
        """Return why running trials are stopped too; None while they continue."""
        config = self._config
        if config.max_seconds is not None and self.seconds >= config.max_seconds:
            return f"budget.max_seconds={config.max_seconds:g} are over"
        if config.max_epochs is None and config.target_accuracy is None:
            return None
        searched = self._searched()
        num_epochs = sum(trials.num_epochs(trial) for trial in searched)
        if config.max_epochs is not None and num_epochs >= config.max_epochs:
            return f"budget.max_epochs={config.max_epochs} were trained"
        best = max(map(self._score, searched), default=-math.inf)
        if config.target_accuracy is not None and best >= config.target_accuracy:
            return f"budget.target_accuracy={config.target_accuracy:g} was reached"
        return None

    def has_reached_target(self, result: dict[str, Any]) -> bool:
        """Return whether this result reaches the target accuracy."""
        target = self._config.target_accuracy
        return target is not None and float(result[OBJECTIVE]) >= target

    @property
    def seconds(self) -> float:
        """Seconds that the search took so far, earlier runs included."""
        return self._seconds_before + self._clock() - self._started

    def keep_time(self) -> None:
        """Record the seconds that the search took; a killed driver loses those after."""
        self._study.set_user_attr(SECONDS, self.seconds)

    def _without_progress(self) -> str | None:
        patience = self._config.patience_trials
        if patience is None:
            return None
        ended = [trial for trial in self._searched() if trial.state in trials.RESULT_STATES]
        ended.sort(key=lambda trial: (trial.datetime_complete, trial.number))
        scores = [self._score(trial) for trial in ended]
        if len(scores) - scores.index(max(scores)) - 1 < patience if scores else True:
            return None
        return f"budget.patience_trials={patience} trials in a row were no better than the best"

    def _score(self, trial: FrozenTrial) -> float:
        """Return how good a trial is so far; minus infinity before its first epoch."""
        value = trials.best_value(trial)
        return -math.inf if value is None else self._metric.score(value)

    def _searched(self) -> list[FrozenTrial]:
        known = self._study.get_trials(deepcopy=False)
        return [t for t in known if trials.is_searched(t) and t.state != TrialState.FAIL]
