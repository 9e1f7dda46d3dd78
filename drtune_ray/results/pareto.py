"""The Pareto front of a search with several objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from drtune_ray.results.trials import is_searched

Direction = StudyDirection | Literal["minimize", "maximize"]


def pareto_front(trials: Sequence[FrozenTrial], directions: Sequence[Direction]) -> tuple[int, ...]:
    """Return the numbers of the trials that no other trial beats in every objective.

    Args:
        trials: Trials of the study; repetitions of finalists do not count.
        directions: Direction of each objective; of a single objective there is no front.
    """
    if len(directions) == 1:
        return ()
    searched = [t for t in trials if t.state == TrialState.COMPLETE and is_searched(t)]
    alone = study_in_memory(directions)
    alone.add_trials(searched)
    return tuple(searched[trial.number].number for trial in alone.best_trials)


def study_in_memory(directions: Sequence[Direction]) -> optuna.Study:
    """Return an empty study that nothing outlives, and that announces nothing."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=directions)
