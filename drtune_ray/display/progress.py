"""The progress of a study, derived from its events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from drtune_ray.config.method import reads_setting
from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric
from drtune_ray.display.text import by, duration, figure, short_names
from drtune_ray.results.trials import TrialSummary
from drtune_ray.tracking.events import Event, MetricsRecorded, RunFinished, RunStarted
from drtune_ray.values import flattened

RUNNING, WAITING, INTERRUPTED = "RUNNING", "WAITING", "INTERRUPTED"
METHOD, METRIC = "method.name", "training.metric"
# Trained trials, as a fraction, below which no time left is estimated.
LEAST_WORK = 0.5


@dataclass
class TrialRow:
    """State of a trial.

    Attributes:
        number: Optuna's number of the trial.
        label: Short name for people.
        settings: Values by dotted path.
        state: Optuna's state; `WAITING` if an earlier run left it, INTERRUPTED if this run did.
        outcome: Reason why it ended.
        epoch: Last completed epoch, from 1.
        num_before: Number of epochs that earlier runs completed.
        value: Value of the metric that chooses at the last epoch.
        best: Best value so far.
        epoch_seconds: Duration of the last epoch in seconds.
    """

    number: int
    label: str
    settings: dict[str, Any]
    state: str = RUNNING
    outcome: str = ""
    epoch: int = 0
    num_before: int = 0
    value: float | None = None
    best: float | None = None
    epoch_seconds: float | None = None

    def setting(self, path: str) -> Any:
        """Return the value of a setting, None if the trial has no such setting or ignores it."""
        is_read = reads_setting(self.settings.get(METHOD, "dr_tune"), path)
        return self.settings.get(path) if is_read or path == METHOD else None

    @property
    def metric(self) -> Metric:
        """Metric that chooses among the trials."""
        return METRICS[self.settings.get(METRIC, DEFAULT_METRIC)]

    @property
    def score(self) -> float:
        """`best` as a number that is the higher the better; minus infinity without one."""
        return -math.inf if self.best is None else self.metric.score(self.best)

    @property
    def may_win(self) -> bool:
        """Whether its best epoch counts: only completed trials win."""
        return self.best is not None and self.state in ("COMPLETE", RUNNING, WAITING, INTERRUPTED)


class StudyProgress:
    """The trials of a study, updated by its events.

    Args:
        num_trials: Number of trials of the whole study.
        num_done: Number of trials that earlier runs finished.
        num_epochs: Number of epochs of a trial that is not stopped early.
        searched: Paths that the search space varies.
        earlier: Trials of earlier runs, including unfinished ones.
        clock: Returns seconds.
    """

    def __init__(
        self,
        num_trials: int,
        num_done: int,
        num_epochs: int,
        searched: Sequence[str],
        earlier: Sequence[TrialSummary] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_epochs, self._searched = num_epochs, tuple(searched)
        self._names = short_names(self._searched)
        self._num_trials, self._num_before = num_trials, num_done
        self._rows = {trial.number: _earlier_row(trial) for trial in earlier}
        self._finished: set[int] = set()  # in this run
        self._clock = clock
        self._started: float | None = None  # when the first trial started: tables come before

    def take(self, event: Event) -> TrialRow | None:
        """Update from an event; return its trial, None for events without one."""
        if not isinstance(event.number, int):
            return None
        if isinstance(event, RunStarted):
            self._started = self._clock() if self._started is None else self._started
            self._start(event.number, event)
        row = self._rows.get(event.number)
        if row is None:
            return None
        if isinstance(event, MetricsRecorded) and event.step >= row.epoch:  # else of an earlier run
            row.epoch = event.step
            row.value = event.metrics.get(row.metric.measure)
            row.best = event.metrics.get(row.metric.best)
            row.epoch_seconds = event.metrics.get("seconds")
        elif isinstance(event, RunFinished):
            row.state, row.outcome = event.state, event.outcome
            if event.state != INTERRUPTED:
                self._finished.add(event.number)
        return row

    @property
    def num_done(self) -> int:
        """Number of trials that ended, in this run or earlier."""
        return self._num_before + len(self._finished)

    @property
    def num_trials(self) -> int:
        """Number of trials of the whole study."""
        return max(self._num_trials, self.num_done)

    @property
    def running(self) -> list[TrialRow]:
        """The trials that are running."""
        return [row for row in self.rows() if row.state == RUNNING]

    @property
    def best(self) -> TrialRow | None:
        """The best trial that may still win, the first of equals."""
        rows = [row for row in self.rows() if row.may_win]
        return max(rows, key=lambda row: (row.score, -row.number), default=None)

    @property
    def epochs_per_minute(self) -> float | None:
        """Speed of all running trials together, by their last epochs; None before the first."""
        seconds = [row.epoch_seconds for row in self.running if row.epoch_seconds]
        return sum(60 / each for each in seconds) if seconds else None

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left at the speed of this run; None before half a trial's work."""
        rows = self.rows()
        started = sum(row.epoch for row in rows if self._is_under_way(row)) / self.num_epochs
        resumed = [r for r in rows if self._is_under_way(r) or r.number in self._finished]
        before = sum(row.num_before for row in resumed) / self.num_epochs
        worked = len(self._finished) + started - before
        if worked < LEAST_WORK or self._started is None:
            return None
        left = max(0.0, self.num_trials - self.num_done - started)
        return (self._clock() - self._started) / worked * left

    def rows(self) -> list[TrialRow]:
        """Return all trials by number."""
        # Copied first, because another thread draws the table.
        return sorted(list(self._rows.values()), key=lambda row: row.number)

    def shown(self, num_rows: int) -> list[TrialRow]:
        """Return the best trial, the running ones and the latest others, by number."""
        best = self.best
        rank = {RUNNING: 1, INTERRUPTED: 1}
        ordered = sorted(
            self.rows(),
            key=lambda row: (0 if row is best else rank.get(row.state, 2), -row.number),
        )
        return sorted(ordered[:num_rows], key=lambda row: row.number)

    def distinguishing(self, rows: Sequence[TrialRow]) -> dict[str, str]:
        """Return the searched paths in which the rows differ, with short names."""
        found = {}
        for path in self._searched:
            values = {repr(row.setting(path)) for row in rows if row.setting(path) is not None}
            if len(values) > 1:
                found[path] = self._names[path]
        return found

    def summary(self) -> list[str]:
        """Return best trial, speed and time left as short pieces of text."""
        best, speed, left = self.best, self.epochs_per_minute, self.seconds_left
        texts = []
        if best:
            value = figure(best.metric, best.best)
            texts += [f"best so far {value}{by(best.metric)}, trial {best.label}"]
        texts += [f"{speed:.3g} epochs/min" if speed else ""]
        if self.num_done < self.num_trials:
            texts += ["time left unknown" if left is None else f"about {duration(left)} left"]
        return [text for text in texts if text]

    def _start(self, number: int, event: RunStarted) -> None:
        what = event.tags.get("drtune.reference") or event.tags.get("drtune.finalist")
        label = f"{number}" + (f" ({what})" if what else "")
        row = self._rows.setdefault(number, TrialRow(number, label, event.params))
        row.state = RUNNING
        self._finished.discard(number)

    def _is_under_way(self, row: TrialRow) -> bool:
        return row.state in (RUNNING, WAITING, INTERRUPTED)


def _earlier_row(trial: TrialSummary) -> TrialRow:
    state = WAITING if trial.state == RUNNING else trial.state
    return TrialRow(
        trial.number,
        trial.label,
        flattened(trial.config),
        state,
        trial.outcome,
        trial.num_epochs,
        trial.num_epochs,
        None,
        trial.best_value,
    )
