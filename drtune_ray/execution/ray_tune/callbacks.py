"""Callbacks of Ray Tune: events for observers, hanging processes, waiting, clean-up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from optuna.trial import FrozenTrial, TrialState
from ray.tune import Callback, Stopper

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.failures import HUNG, Failure
from drtune_ray.execution.heartbeat import HeartbeatMonitor
from drtune_ray.execution.placement_groups import remove_orphans
from drtune_ray.execution.ray_state import num_train_workers
from drtune_ray.execution.ray_tune.patches import failure_of
from drtune_ray.execution.ray_tune.searcher import StudySearch
from drtune_ray.execution.resource_wait import ResourceWait
from drtune_ray.execution.run_context import RunContext
from drtune_ray.results.events import epoch_event, run_finished, run_started
from drtune_ray.search.budget import Budget
from drtune_ray.training.checkpoint import folder_name
from drtune_ray.training.reports import CONFIG_NUMBER, result_history

logger = logging.getLogger(__name__)
ERROR_TAG = "drtune.error"
LOOK_SECONDS = 1.0
END_SECONDS = 15.0


class StudyCallback(Callback):  # type: ignore[misc]
    """Emits an event for the start, each epoch and the end of every trial.

    It names the machine's failures, and kills processes that make no progress.

    Args:
        search: The study's searcher; it records why a trial failed.
        context: The study's run.
        watch: Monitor of the trials' processes; None if they have another.
    """

    def __init__(
        self, search: StudySearch, context: RunContext, watch: HeartbeatMonitor | None
    ) -> None:
        self._search, self._context, self._watch = search, context, watch
        self._running: dict[str, Any] = {}
        self._ended: dict[int, Failure] = {}
        self._seen: set[tuple[int, int]] = set()

    @property
    def running(self) -> list[str]:
        """Names of the folders of the running trials."""
        return list(self._running)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a restore that is never asked for."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Kill the processes without progress; Tune restarts their trials."""
        try:
            self._context.artifacts.check_lease()
        except EnvironmentProblem as problem:
            self._search.end_with(problem)
        self._search.check_storage()
        if self._watch is None:
            return
        for name in self._watch.stuck(self.running):
            trial = self._running.pop(name)
            hung = f"{HUNG} for {self._watch.hang_seconds:g} s"
            self._ended[trial.config[CONFIG_NUMBER]] = Failure(hung, f"{hung}: it did not run")
            ray.kill(trial.temporary_state.ray_actor)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Emit the start of a trial, also when it resumes."""
        number = trial.config[CONFIG_NUMBER]
        self._running[folder_name(number)] = trial
        self._context.emit(run_started(self._frozen(number)))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Emit an epoch, and the earlier ones that a killed driver missed."""
        number = trial.config[CONFIG_NUMBER]
        for record in result_history(result):
            if (number, record.epoch) not in self._seen:
                self._seen.add((number, record.epoch))
                self._context.emit(epoch_event(number, record))
        if (error := self._context.full_disk()) is not None:
            # An unfinished trial reports all its epochs again.
            self._search.end_with(error)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Emit the end of a trial, as Optuna recorded it."""
        self._running.pop(folder_name(trial.config[CONFIG_NUMBER]), None)
        self._finish(trial.config[CONFIG_NUMBER])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log the failure of a process whose trial is restarted."""
        number, failure = trial.config[CONFIG_NUMBER], self._failure(trial)
        logger.warning("trial %d resumes from its last save: %s", number, failure.error)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record and emit the last failure of a trial."""
        number, failure = trial.config[CONFIG_NUMBER], self._failure(trial)
        logger.warning("trial %d failed: %s", number, failure.error)
        self._search.fail(trial.trial_id, failure.outcome)
        self._finish(number, {ERROR_TAG: failure.error})

    def _failure(self, trial: Any) -> Failure:
        number = trial.config[CONFIG_NUMBER]
        self._running.pop(folder_name(number), None)
        if number in self._ended:
            return self._ended.pop(number)
        failure = failure_of(trial, self._context.trials_folder / folder_name(number))
        if failure.problem is not None:
            # Such a node is free at once: it would take and fail one trial after another.
            self._search.end_with(failure.problem)
        return failure

    def _finish(self, number: int, tags: dict[str, str] | None = None) -> None:
        frozen = self._frozen(number)
        if frozen.state != TrialState.RUNNING:
            event = run_finished(frozen)
            self._context.emit(replace(event, tags=event.tags | (tags or {})))

    def _frozen(self, number: int) -> FrozenTrial:
        return self._search.study.get_trials(deepcopy=False)[number]


class PlacementGroupCleaner(Callback):  # type: ignore[misc]
    """Removes the placement groups of dead controllers, and waits until all are gone.

    Args:
        sweep: Called with the number of each trial that ended, once no worker can write into its
            folder any more.
    """

    def __init__(self, sweep: Callable[[int], None]) -> None:
        self._sweep = sweep
        self._ended: list[int] = []
        self._looked = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a restore that is never asked for."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune's loop turns."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            remove_orphans()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note a trial that ended, or was stopped within an epoch."""
        self._ended.append(trial.config[CONFIG_NUMBER])

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Wait for the workers of the trials that were stopped last."""
        deadline = time.monotonic() + END_SECONDS
        while remove_orphans() or num_train_workers():
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        for number in self._ended:
            self._sweep(number)


class _GaveUp(BaseException):
    """Leaves Tune's loop at once, where an Exception would first wait for the trials to end."""

    def __init__(self, problem: EnvironmentProblem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@contextmanager
def giving_up() -> Iterator[None]:
    """Raise the problem for which `WaitCallback` ended Tune's loop.

    Raises:
        EnvironmentProblem: If no trial had its resources for too long.
    """
    try:
        yield
    except _GaveUp as left:
        raise left.problem from None


class WaitCallback(Callback):  # type: ignore[misc]
    """Calls `ResourceWait.check` at every turn of Tune's loop, within `giving_up`."""

    def __init__(self, wait: ResourceWait) -> None:
        self._wait = wait

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a restore that is never asked for."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune's loop turns."""
        try:
            self._wait.check()
        except EnvironmentProblem as problem:
            raise _GaveUp(problem) from None


class BudgetStopper(Stopper):  # type: ignore[misc]
    """Stops trials at the end of their epoch when the study's budget says so."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes it to disks, and the address of the storage holds a password."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether to stop a trial at this epoch."""
        return self._budget.stops(result)

    def stop_all(self) -> bool:
        """False: each trial is stopped at the end of its own epoch."""
        return False
