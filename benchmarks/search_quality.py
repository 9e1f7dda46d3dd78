"""Count the epochs until a search is as good as random search without early stopping.

    .venv/bin/python benchmarks/search_quality.py

Searches of 30 trials, two at a time, are replayed from tables (benchmarks/curves.py made them:
every configuration of a grid, fully trained on 100 or 400 real images) through the package's own
proposals, samplers, scheduler and searcher, with their defaults. All searches of a seed begin with
the same five random points; there are no reference trials. The target is the median over the seeds
of the accuracy with which random search without stopping ends. A search reaches it when a trial
that ran to its end is that good: only such a trial can win. Epochs of all trials count.

The second table is about the learning-rate schedule (schedules.parquet): the rank correlation
(Spearman's rho) between the order of the configurations at ASHA's rungs and at the end, and the
best configuration that is left where a third continues from each rung.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq
from curves import BASE, EPOCHS, GRID, RUNGS, SCHEDULES
from report import describe_machine
from scipy.stats import spearmanr

from drtune_ray.config.study import BudgetConfig, SamplerConfig, SchedulerConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.execution.ray_tune.schedulers import build_scheduler
from drtune_ray.execution.ray_tune.searcher import StudySearch
from drtune_ray.search.budget import Budget
from drtune_ray.search.outcomes import Outcomes
from drtune_ray.search.proposals import SearchProposals
from drtune_ray.search.samplers import build_sampler
from drtune_ray.space.search_space import SearchSpace, start_points
from drtune_ray.training.reports import (
    COMPLETED,
    CONFIG_TRIAL,
    EPOCH,
    HISTORY,
    NUM_THREADS,
    OBJECTIVE,
    OUTCOME,
)
from drtune_ray.values import flattened

HERE = Path(__file__).parent
NUM_TRIALS, NUM_GIVEN, NUM_SEEDS, AT_A_TIME = 30, 5, 10, 2
NONE, ASHA = SchedulerConfig(name="none"), SchedulerConfig()
SEARCHES = {
    "random": ("random", NONE),
    "random with ASHA": ("random", ASHA),
    "TPE": ("tpe", NONE),
    "TPE with ASHA (default)": ("tpe", ASHA),
    "the same, min_epochs=2": ("tpe", ASHA.model_copy(update={"min_epochs": 2})),
}
Point = tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """A fully trained configuration: validation accuracy by epoch, and how it ended."""

    values: tuple[float, ...]
    outcome: str

    def best(self, num_epochs: int | None = None) -> float:
        """Return the best accuracy of the first so many epochs, or of all."""
        return max(self.values[:num_epochs], default=0.0)


@dataclass
class _Trial:
    trial_id: str
    tune: Any
    curve: Curve
    epoch: int = 0


@dataclass
class Replay:
    """A search over the table.

    Attributes:
        bests: After each completed trial: epochs trained until then, of all trials, and its best.
    """

    curves: dict[Point, Curve]
    max_epochs: int
    search: StudySearch
    scheduler: Any
    num_epochs: int = 0
    bests: list[tuple[int, float]] = field(default_factory=list)

    def run(self) -> Replay:
        """Run until the search has no further trial; an epoch takes one unit of time."""
        running: list[tuple[float, int, _Trial]] = []
        self._fill(running, 0.0)
        while running:
            now, order, trial = heapq.heappop(running)
            if self._epoch_goes_on(trial):
                heapq.heappush(running, (now + 1.0, order, trial))
            else:
                self._fill(running, now)
        return self

    def epochs_until(self, target: float) -> float:
        """Return the epochs until a completed trial was at least this good, or infinity."""
        return next((epochs for epochs, best in self.bests if best >= target), math.inf)

    @property
    def final_best(self) -> float:
        """Best accuracy of the completed trials."""
        return max(best for _, best in self.bests)

    def _fill(self, running: list[tuple[float, int, _Trial]], now: float) -> None:
        while len(running) < AT_A_TIME:
            trial_id = f"{len(self.search.study.trials)}"
            config = self.search.suggest(trial_id)
            if not isinstance(config, dict):
                return
            values = flattened(json.loads(config[CONFIG_TRIAL]))
            tune = _TuneTrial(config)
            if self.scheduler is not None:
                self.scheduler.on_trial_add(None, tune)
            curve = self.curves[tuple(values[path] for path in GRID)]
            number = int(config["number"])
            heapq.heappush(running, (now + 1.0, number, _Trial(trial_id, tune, curve)))

    def _epoch_goes_on(self, trial: _Trial) -> bool:
        self.num_epochs += 1
        trial.epoch += 1
        values = trial.curve.values
        has_diverged = trial.epoch > len(values)
        outcome = trial.curve.outcome if has_diverged or trial.epoch == self.max_epochs else ""
        result = _result(trial.curve, min(trial.epoch, len(values)), outcome)
        if outcome:
            if self.scheduler is not None:
                self.scheduler.on_trial_complete(None, trial.tune, result)
            self._end(trial, result)
            return False
        self.search.on_trial_result(trial.trial_id, result)
        if self.scheduler is None:
            return True
        if self.scheduler.on_trial_result(None, trial.tune, result) == "CONTINUE":
            return True
        self._end(trial, result)
        return False

    def _end(self, trial: _Trial, result: dict[str, Any]) -> None:
        self.search.on_trial_complete(trial.trial_id, result)
        if result[OUTCOME] == COMPLETED:
            self.bests.append((self.num_epochs, result[OBJECTIVE]))


@dataclass(frozen=True)
class _TuneTrial:
    config: dict[str, Any]


def _result(curve: Curve, epoch: int, outcome: str) -> dict[str, Any]:
    best = curve.best(epoch) if epoch else math.nan
    record = {"epoch": epoch, "time_ms": 0, "metrics": {OBJECTIVE: best}, "steps": []}
    return {
        OBJECTIVE: best,
        EPOCH: epoch,
        OUTCOME: outcome,
        HISTORY: json.dumps([record] if epoch else []),
        NUM_THREADS: 1,
    }


def read_curves(name: str) -> dict[tuple[str, Point], Curve]:
    """Return the table by schedule and place in the grid."""
    rows = pq.read_table(HERE / name).to_pylist()
    return {
        (row["schedule"], tuple(row[path] for path in GRID)): Curve(
            tuple(row["val_accuracy"]), row["outcome"]
        )
        for row in rows
    }


def replayed(
    curves: dict[Point, Curve], max_epochs: int, sampler: str, scheduler: SchedulerConfig, seed: int
) -> Replay:
    """Set up a search of the table with the package's parts."""
    base = TrialConfig.from_mapping({"data": {"train": "."}}).with_values(BASE)
    axes = dict(zip(GRID, (sorted(set(axis)) for axis in zip(*curves, strict=True)), strict=True))
    base = base.with_values({path: values[0] for path, values in axes.items()})
    searched = {path: {"ordered": values} for path, values in axes.items() if len(values) > 1}
    space = SearchSpace.from_mapping({"parameters": searched}, base)
    drawn = np.random.default_rng(seed).permutation(len(curves))[:NUM_GIVEN]
    points = [
        {
            path: value
            for path, value in zip(GRID, sorted(curves)[at], strict=True)
            if path in searched
        }
        for at in drawn
    ]
    study = optuna.create_study(direction="maximize")
    budget = Budget(NUM_TRIALS, BudgetConfig(), study)
    proposals = SearchProposals(
        study,
        space,
        base,
        (),
        budget,
        partial(build_sampler, SamplerConfig(name=sampler), seed),
        start_with=start_points(space, points),
    )
    stopping = build_scheduler(scheduler, max_epochs, ())
    return Replay(
        curves, max_epochs, StudySearch(proposals, Outcomes(study, budget)), stopping
    ).run()


def show_searches(images: int, max_epochs: int) -> None:
    table = read_curves(f"curves-{images}.parquet")
    curves = {point: curve for (_, point), curve in table.items()}
    found = {
        name: [replayed(curves, max_epochs, *how, seed) for seed in range(NUM_SEEDS)]
        for name, how in SEARCHES.items()
    }
    target = statistics.median(replay.final_best for replay in found["random"])
    most = statistics.median(replay.num_epochs for replay in found["random"])
    best = max(curve.best() for curve in curves.values())
    diverged = sum(curve.outcome != COMPLETED for curve in curves.values())
    print(
        f"\n{images} images: {len(curves)} configurations ({diverged} diverge), {max_epochs} "
        f"epochs; the best of them "
        f"{best:.4f}, the target {target:.4f}; {NUM_TRIALS} trials, {NUM_SEEDS} seeds, medians\n\n"
        f"{'search':26}epochs to target  of random's {most:.0f}  all epochs  final best  "
        "seeds that reach it"
    )
    for name, replays in found.items():
        epochs = [replay.epochs_until(target) for replay in replays]
        middle, num_reached = statistics.median(epochs), sum(map(math.isfinite, epochs))
        total = statistics.median(replay.num_epochs for replay in replays)
        final = statistics.median(replay.final_best for replay in replays)
        print(
            f"{name:26}{middle:16.0f}{middle / most:17.3f}{total:12.0f}{final:12.4f}"
            f"{num_reached:12} of {NUM_SEEDS}"
        )


def show_schedules() -> None:
    table = read_curves("schedules.parquet")
    print(
        f"\n{len(table) // len(SCHEDULES)} configurations\n{'schedule':12}{'rho at 2':>10}"
        f"{'rho at 6':>10}{'best':>8}{'best left':>11}{'mean':>8}"
    )
    for schedule in SCHEDULES:
        curves = [curve for (name, _), curve in table.items() if name == schedule]
        finals = [curve.best() for curve in curves]
        rhos = [
            float(spearmanr([curve.best(rung) for curve in curves], finals).statistic)
            for rung in RUNGS[1:-1]
        ]
        left = curves
        for rung in RUNGS[1:-1]:
            left = sorted(left, key=lambda curve, rung=rung: -curve.best(rung))  # type: ignore[misc]
            left = left[: math.ceil(len(left) / 3)]
        survivor = max(curve.best() for curve in left)
        print(
            f"{schedule:12}{rhos[0]:10.2f}{rhos[1]:10.2f}{max(finals):8.4f}{survivor:11.4f}"
            f"{statistics.fmean(finals):8.4f}"
        )


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(describe_machine("benchmarks/search_quality.py"))
    for images, max_epochs in EPOCHS.items():
        show_searches(images, max_epochs)
    show_schedules()


if __name__ == "__main__":
    main()
