"""Changes of Ray Tune's behaviour that a study needs, applied from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray.air.execution._internal import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.analysis import ExperimentAnalysis
from ray.tune.experiment import Trial

from drtune_ray.execution.failures import Failure, failure_from


def failure_of(trial: Any, trial_folder: Path) -> Failure:
    """Return the failure that ended the process of a Tune trial.

    Stack files of a hanging process are moved, so that they are not taken for the next process's.
    """
    return failure_from(_kept_error(trial), trial_folder)


@contextlib.contextmanager
def nothing_unpickled() -> Iterator[None]:
    """Keep Tune from reading pickles from a disk; its trials hold their errors in memory.

    Tune (Ray 2.60) writes the error of a trial into Ray's session folder, which is open to all
    users of the machine, and into its experiment folder under our storage, and unpickles it from
    there at the end of ``fit``; of an experiment without trials it unpickles the state.
    """
    former = Trial.handle_error, Trial.get_pickled_error, ExperimentAnalysis._load_trials

    def handle_error(trial: Any, exc: Exception | None = None) -> None:
        former[0](trial, exc)
        trial.temporary_state.error = exc  # is never saved

    Trial.handle_error, Trial.get_pickled_error = handle_error, _kept_error
    ExperimentAnalysis._load_trials = lambda analysis: []
    try:
        yield
    finally:
        Trial.handle_error, Trial.get_pickled_error, ExperimentAnalysis._load_trials = former


def _kept_error(trial: Any) -> BaseException | None:
    return getattr(trial.temporary_state, "error", None)


class ProcessLost(RayActorError):  # type: ignore[misc]
    """An error of an actor that Tune does not know, as one that it knows."""


@contextlib.contextmanager
def lost_processes_are_failures() -> Iterator[None]:
    """Make every error that Ray reports of an actor a failure of its trial.

    Tune handles `RayActorError` and `RayTaskError` and ends the whole study on any other error,
    such as that of Ray's memory monitor (Ray 2.60, `RayActorManager._actor_task_failed`).
    """
    methods = ("_actor_task_failed", "_actor_start_failed")
    former = {name: getattr(RayActorManager, name) for name in methods}

    def translated(method: Callable[..., None]) -> Callable[..., None]:
        def failed(manager: Any, *, exception: Exception, **of_what: Any) -> None:
            is_known = isinstance(exception, RayActorError | RayTaskError)
            if isinstance(exception, RayError) and not is_known:
                exception = ProcessLost(error_msg=str(exception))
            method(manager, exception=exception, **of_what)

        return failed

    for name, method in former.items():
        setattr(RayActorManager, name, translated(method))
    try:
        yield
    finally:
        for name, method in former.items():
            setattr(RayActorManager, name, method)
