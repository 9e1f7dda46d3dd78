"""Simulate how many epochs a study takes: its own scheduler over random trials, many times.

Accuracies are not known beforehand, but early stopping by rank depends on little of them: on how
similar the order of the trials is from one rung to the next. Every trial gets a curve that rises
with the epochs, plus a part that is constant and a part that is new in each epoch.

Not simulated: accuracies that end a study or trial (a target, patience, divergence), and a sampler
that improves with time, whose later trials are stopped less often.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from drtune_ray.config.study import StudyConfig
from drtune_ray.execution.ray_tune.schedulers import build_scheduler
from drtune_ray.search.finalists import CE_TUNING
from drtune_ray.training.reports import CONFIG_NUMBER, EPOCH, OBJECTIVE

# Correlation over the trials of two of their epochs, without the common rise.
ORDER_CORRELATION = 0.8
# The common rise: FIRST at epoch 1, towards LAST; trials differ by SPREAD (standard deviation).
FIRST, LAST, SPREAD = 0.5, 0.85, 0.08
MAX_STUDIES, MIN_STUDIES, MAX_RESULTS = 200, 20, 100_000
Curves = NDArray[np.float64]


@dataclass(frozen=True)
class Pace:
    """Seconds that a trial takes before its first epoch, and for each epoch."""

    begin_seconds: float
    epoch_seconds: float


@dataclass(frozen=True)
class Spread:
    """Mean of a figure over the simulated studies, and the ends of its middle 90 %."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Simulated:
    """One simulated study.

    Attributes:
        num_trials: Trials that the search starts.
        search_epochs: Epochs of all these trials.
        search_seconds: Time from the first trial's start to the last one's end.
        final_trials: Trainings of the finalists.
        final_epochs: Epochs of all these trainings.
        final_seconds: Time from the first training's start to the last one's end.
    """

    num_trials: float
    search_epochs: float
    search_seconds: float
    final_trials: float
    final_epochs: float
    final_seconds: float

    @property
    def epochs(self) -> float:
        """Epochs of search and finalists."""
        return self.search_epochs + self.final_epochs

    @property
    def seconds(self) -> float:
        """Time of search and finalists."""
        return self.search_seconds + self.final_seconds


def simulated_studies(
    config: StudyConfig, paces: Sequence[Pace], at_a_time: int, seconds_before: float = 0.0
) -> tuple[Simulated, ...]:
    """Run the study's scheduler many times, each time over other random trials.

    Args:
        config: The study.
        paces: Pace of each trial of the search, in the order in which they start: the user's own
            points, the reference trials, the sampled trials.
        at_a_time: How many trials run side by side.
        seconds_before: Part of ``budget.max_seconds`` that is spent before the first trial starts.
    """
    num_epochs = config.trial.training.last_epoch
    num_studies = max(MIN_STUDIES, min(MAX_STUDIES, MAX_RESULTS // (len(paces) * num_epochs)))
    generator = np.random.default_rng(config.seed)
    return tuple(
        simulated(
            config,
            random_curves(len(paces), num_epochs, generator),
            paces,
            at_a_time,
            generator,
            seconds_before,
        )
        for _ in range(num_studies)
    )


def simulated(
    config: StudyConfig,
    curves: Curves,
    paces: Sequence[Pace],
    at_a_time: int,
    generator: np.random.Generator,
    seconds_before: float = 0.0,
) -> Simulated:
    """Simulate one study whose trials reach the accuracies of given curves.

    Args:
        config: The study.
        curves: Best accuracy so far, (trials, epochs).
        paces: Pace of each trial.
        at_a_time: How many trials run side by side.
        generator: Decides which of two trials comes first that end an epoch at the same time.
        seconds_before: Part of ``budget.max_seconds`` that is spent before the first trial starts.
    """
    search = _Search(config, curves, paces, at_a_time, generator, seconds_before)
    search.run()
    finalists = _finalists(config, curves, search.completed)
    num_seeds = config.finalists.num_seeds
    num_epochs = curves.shape[1]
    runs = [paces[number] for _ in range(num_seeds) for number in finalists]
    return Simulated(
        search.num_started,
        search.num_epochs,
        search.seconds,
        len(runs),
        len(runs) * num_epochs,
        _makespan([p.begin_seconds + num_epochs * p.epoch_seconds for p in runs], at_a_time),
    )


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and the middle 90 % of a figure over the simulated studies."""
    low, high = np.percentile(values, [5, 95])
    return Spread(statistics.fmean(values), float(low), float(high))


def random_curves(num_trials: int, num_epochs: int, generator: np.random.Generator) -> Curves:
    """Return the best accuracy so far of random trials, (trials, epochs)."""
    stays = generator.standard_normal((num_trials, 1))
    new = generator.standard_normal((num_trials, num_epochs))
    own = np.sqrt(ORDER_CORRELATION) * stays + np.sqrt(1 - ORDER_CORRELATION) * new
    rise = LAST - (LAST - FIRST) / np.arange(1, num_epochs + 1)
    best: Curves = np.maximum.accumulate(rise + SPREAD * own, axis=1)
    return best


@dataclass
class _Search:
    """The search's trials over simulated time; the arguments are those of `simulated`."""

    config: StudyConfig
    curves: Curves
    paces: Sequence[Pace]
    at_a_time: int
    generator: np.random.Generator
    seconds_before: float
    num_started: int = 0
    num_epochs: int = 0
    seconds: float = 0.0
    completed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = len(self.config.start_with)
        references = set(range(first, first + len(self.config.reference_trials)))
        self._scheduler = build_scheduler(self.config.scheduler, self.curves.shape[1], references)
        self._running: list[tuple[float, float, int, int]] = []

    def run(self) -> None:
        """Run all trials, from the first one's start to the last one's end."""
        self._start_trials()
        while self._running:
            self.seconds, _, number, epoch = heapq.heappop(self._running)
            self.num_epochs += 1
            if self._continues(number, epoch):
                self._push(self.seconds + self.paces[number].epoch_seconds, number, epoch + 1)
            else:
                self._start_trials()

    def _start_trials(self) -> None:
        while (
            len(self._running) < self.at_a_time
            and self.num_started < len(self.paces)
            and not self._is_spent()
        ):
            number, pace = self.num_started, self.paces[self.num_started]
            self.num_started += 1
            if self._scheduler is not None:
                self._scheduler.on_trial_add(None, _tune_trial(number))
            self._push(self.seconds + pace.begin_seconds + pace.epoch_seconds, number, 1)

    def _push(self, seconds: float, number: int, epoch: int) -> None:
        heapq.heappush(self._running, (seconds, self.generator.random(), number, epoch))

    def _continues(self, number: int, epoch: int) -> bool:
        result = {EPOCH: epoch, OBJECTIVE: float(self.curves[number, epoch - 1])}
        if epoch == self.curves.shape[1]:
            self.completed.append(number)
        is_last = epoch == self.curves.shape[1] or self._is_spent()
        if self._scheduler is None:
            return not is_last
        trial = _tune_trial(number)
        if is_last:
            self._scheduler.on_trial_complete(None, trial, result)
            return False
        return self._scheduler.on_trial_result(None, trial, result) == "CONTINUE"

    def _is_spent(self) -> bool:
        limit_epochs, limit_seconds = self.config.budget.max_epochs, self.config.budget.max_seconds
        if limit_epochs is not None and self.num_epochs >= limit_epochs:
            return True
        return limit_seconds is not None and self.seconds + self.seconds_before >= limit_seconds


def _finalists(config: StudyConfig, curves: Curves, completed: Sequence[int]) -> list[int]:
    """Return the trials that are trained again, chosen as `finalists.finalists` does."""
    if not config.finalists.num_seeds:
        return []
    ranked = sorted(completed, key=lambda number: (-curves[number, -1], number))
    chosen = ranked[: config.finalists.num_configurations]
    ce_tuning = [number for number in ranked if _is_ce_tuning(config, number)][:1]
    return chosen + [number for number in ce_tuning if number not in chosen]


def _is_ce_tuning(config: StudyConfig, number: int) -> bool:
    """Whether a trial trains without the method; sampled trials are taken to use the base's."""
    index = number - len(config.start_with)
    if 0 <= index < len(config.reference_trials):
        return config.reference_trials[index] == CE_TUNING
    return config.trial.method.name == CE_TUNING


def _makespan(durations: Sequence[float], at_a_time: int) -> float:
    """Return the time until all are done, each taken by the place that is free first."""
    places = [0.0] * at_a_time
    for duration in durations:
        heapq.heapreplace(places, places[0] + duration)
    return max(places)


def _tune_trial(number: int) -> SimpleNamespace:
    return SimpleNamespace(config={CONFIG_NUMBER: number})
