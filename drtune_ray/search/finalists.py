"""The finalists: the search's best configurations and CE-tuning, again on seeds of their own.

The best of n trials on one seed is a maximum, and flatters. What the finalists reach on new seeds
was not chosen by looking at it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import TrialState

from drtune_ray.config.study import FinalistsConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.results.trials import TrialSummary, best_first, config_of
from drtune_ray.search.proposals import FixedTrial

CE_TUNING = "ce_tuning"


@dataclass(frozen=True)
class Finalist:
    """A configuration of the search and what it reached on new seeds.

    Attributes:
        source: The trial of the search.
        num_seeds: On how many new seeds it is to be trained.
        runs: Those that completed.
    """

    source: TrialSummary
    num_seeds: int
    runs: tuple[TrialSummary, ...]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Best validation accuracy on each seed, 0 to 1."""
        return tuple(run.best_val_accuracy or 0.0 for run in self.runs)

    @property
    def is_complete(self) -> bool:
        """Whether it was trained to its end on every seed."""
        return len(self.runs) == self.num_seeds

    @property
    def mean(self) -> float:
        """Of `accuracies`."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation of `accuracies`; None of a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def best_run(self) -> TrialSummary:
        """The run with the best validation accuracy, the first of equals: its weights ship."""
        return max(self.runs, key=lambda run: (run.best_val_accuracy or 0.0, -run.number))


def finalists(trials: Sequence[TrialSummary], config: FinalistsConfig) -> tuple[Finalist, ...]:
    """The best configurations of the search and its best CE-tuning, best first.

    Args:
        trials: All trials of the study, repetitions that were run included.
        config: How many configurations and seeds.
    """
    if not config.num_seeds:
        return ()
    ranked = best_first(trial for trial in trials if not trial.is_final)
    ce_tuning = [t for t in ranked if t.config["method"]["name"] == CE_TUNING][:1]
    chosen = ranked[: config.num_configurations]
    chosen += [trial for trial in ce_tuning if trial not in chosen]
    return tuple(_finalist(source, trials, config.num_seeds) for source in chosen)


def repetitions(chosen: Sequence[Finalist]) -> tuple[FixedTrial, ...]:
    """The trials that the finalists ask for: each seed of all of them before the next one.

    Seed and view seed of a repetition are the same for all finalists, so that their differences
    are those of the configurations.
    """
    return tuple(
        FixedTrial(_name(finalist.source, index), _repetition(finalist.source, index))
        for index in range(1, max((f.num_seeds for f in chosen), default=0) + 1)
        for finalist in chosen
    )


def best_finalist(chosen: Sequence[Finalist]) -> Finalist | None:
    """The one with the best mean among those trained on every seed; None where there is none.

    Of equals it is the one that the search ranked higher.
    """
    complete = [finalist for finalist in chosen if finalist.is_complete]
    return max(complete, key=lambda finalist: finalist.mean, default=None)


def _finalist(source: TrialSummary, trials: Sequence[TrialSummary], num_seeds: int) -> Finalist:
    names = {_name(source, index) for index in range(1, num_seeds + 1)}
    completed = (t for t in trials if t.state == TrialState.COMPLETE.name)
    return Finalist(source, num_seeds, tuple(t for t in completed if t.finalist in names))


def _name(source: TrialSummary, index: int) -> str:
    return f"trial {source.number}, seed {_seeds(source, index)[0]}"


def _seeds(source: TrialSummary, index: int) -> tuple[int, int]:
    """Seed and view seed of a repetition, counted from 1: the search's own is the one before."""
    return source.config["seed"] + index, source.config["data"]["view_seed"] + index


def _repetition(source: TrialSummary, index: int) -> TrialConfig:
    seed, view_seed = _seeds(source, index)
    return config_of(source).with_values({"seed": seed, "data.view_seed": view_seed})
