"""The finalists: the search's best configurations and CE-tuning, trained again on new seeds.

The best of n trials on one seed is a maximum and therefore optimistic. The values on new seeds
took no part in choosing the finalists.
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
    """A configuration of the search and its values on new seeds.

    Attributes:
        source: The trial of the search.
        num_seeds: Number of new seeds to train it on.
        runs: The completed trainings.
    """

    source: TrialSummary
    num_seeds: int
    runs: tuple[TrialSummary, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """Best value of the metric that chooses on each seed."""
        return tuple(run.best_value for run in self.runs if run.best_value is not None)

    @property
    def is_complete(self) -> bool:
        """Whether the training on every seed completed."""
        return len(self.runs) == self.num_seeds

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return statistics.fmean(self.values)

    @property
    def score(self) -> float:
        """The mean as a number that is the higher the better."""
        return self.source.metric.score(self.mean)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the values; None if there are fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def best_run(self) -> TrialSummary:
        """Run with the best value, the first of equals; its weights are shipped."""
        return max(self.runs, key=lambda run: (run.score, -run.number))


def finalists(trials: Sequence[TrialSummary], config: FinalistsConfig) -> tuple[Finalist, ...]:
    """Choose the best configurations of the search and its best CE-tuning, best first.

    Args:
        trials: All trials of the study, with the repetitions so far.
        config: Numbers of configurations and seeds.
    """
    if not config.num_seeds:
        return ()
    ranked = best_first(trial for trial in trials if not trial.is_final)
    ce_tuning = [t for t in ranked if t.config["method"]["name"] == CE_TUNING][:1]
    chosen = ranked[: config.num_configurations]
    chosen += [trial for trial in ce_tuning if trial not in chosen]
    return tuple(_finalist(source, trials, config.num_seeds) for source in chosen)


def repetitions(chosen: Sequence[Finalist]) -> tuple[FixedTrial, ...]:
    """Return the trainings of the finalists, each seed of all finalists before the next seed.

    A repetition has the same seed and view seed for all finalists, so that their differences come
    from the configurations.
    """
    return tuple(
        FixedTrial(_name(finalist.source, index), _repetition(finalist.source, index))
        for index in range(1, max((f.num_seeds for f in chosen), default=0) + 1)
        for finalist in chosen
    )


def best_finalist(chosen: Sequence[Finalist]) -> Finalist | None:
    """Return the finalist with the best mean among those trained on every seed, or None.

    Of equals the one that the search ranked higher is returned.
    """
    complete = [finalist for finalist in chosen if finalist.is_complete]
    return max(complete, key=lambda finalist: finalist.score, default=None)


def _finalist(source: TrialSummary, trials: Sequence[TrialSummary], num_seeds: int) -> Finalist:
    names = {_name(source, index) for index in range(1, num_seeds + 1)}
    completed = (t for t in trials if t.state == TrialState.COMPLETE.name)
    return Finalist(source, num_seeds, tuple(t for t in completed if t.finalist in names))


def _name(source: TrialSummary, index: int) -> str:
    return f"trial {source.number}, seed {_seeds(source, index)[0]}"


def _seeds(source: TrialSummary, index: int) -> tuple[int, int]:
    """Return seed and view seed of a repetition, from 1; the search's own seed precedes them."""
    return source.config["seed"] + index, source.config["data"]["view_seed"] + index


def _repetition(source: TrialSummary, index: int) -> TrialConfig:
    seed, view_seed = _seeds(source, index)
    return config_of(source).with_values({"seed": seed, "data.view_seed": view_seed})
