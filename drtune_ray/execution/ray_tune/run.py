"""One part of a study through Ray Tune: the search, or its finalists."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import TrialScheduler

from drtune_ray.config.study import StudyConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.execution.capacity import Capacity, Cluster, Demand, trial_demand, trials_that_fit
from drtune_ray.execution.heartbeat import HeartbeatMonitor
from drtune_ray.execution.interrupts import saving_when_interrupted
from drtune_ray.execution.ray_train.trainer import drive_trial
from drtune_ray.execution.ray_tune.callbacks import (
    BudgetStopper,
    PlacementGroupCleaner,
    StudyCallback,
    WaitCallback,
    giving_up,
)
from drtune_ray.execution.ray_tune.patches import lost_processes_are_failures, nothing_unpickled
from drtune_ray.execution.ray_tune.searcher import StudySearch
from drtune_ray.execution.resident_actor import TrialActor
from drtune_ray.execution.resource_wait import ResourceWait
from drtune_ray.execution.session import scratch_folder
from drtune_ray.execution.worker import WorkerContext
from drtune_ray.search.budget import Budget
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.record import SCRATCH_NAME, TRIALS_FOLDER
from drtune_ray.tracking.events import Sink
from drtune_ray.training.checkpoint import trial_folder

MAX_MACHINE_FAILURES = 2


@dataclass(frozen=True)
class TuneRun:
    """What all parts of a study have in common when Tune runs them.

    Attributes:
        config: The study.
        study_id: Its id.
        artifacts: What outlives this machine's disk.
        cluster: Where the trials run.
        emit: Takes the events.
        disk_error: Why an event was lost, if one was.
        on_interrupt: Called when the study is interrupted.
    """

    config: StudyConfig
    study_id: str
    artifacts: StudyArtifacts
    cluster: Cluster
    emit: Sink
    disk_error: Callable[[], OSError | None]
    on_interrupt: Callable[[], None]

    @property
    def trials_at_a_time(self) -> int:
        """How many trials run side by side."""
        return trials_that_fit(self._demand, self.config.resources, self.cluster.capacity)

    def run(
        self,
        search: StudySearch,
        tables: Mapping[str, Tables],
        *,
        scheduler: TrialScheduler | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Run the trials that a searcher proposes until it has no more.

        Args:
            search: Proposes trials and takes what became of them.
            tables: By `TrialConfig.tables_key`.
            scheduler: Stops trials early; None: each runs to its end.
            budget: Stops trials for the sake of the whole study.
        """
        from ray import tune

        workplace, watch = self._workplace(tables), self._watch()
        wait = ResourceWait(
            self._demand, self.config.resources.wait_seconds, self.cluster.on_notice
        )
        callback = StudyCallback(
            search,
            self.emit,
            workplace.trials_folder,
            watch,
            self.disk_error,
            self.artifacts.check_lease,
        )
        callbacks = [callback, WaitCallback(wait)]
        if watch is None:
            callbacks.append(PlacementGroupCleaner(self._drop_resumable))
        # Our callback tells a trial's error in one line, and Tune's own files are not needed.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        # Tune's own folder is disposable: Optuna's storage and ours hold everything.
        with scratch_folder(self.config.folder / SCRATCH_NAME) as scratch:
            tuner = tune.Tuner(
                tune_trainable(self.config, workplace, self.cluster.capacity),
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=scheduler,
                    num_samples=-1,
                    max_concurrent_trials=self.trials_at_a_time,
                    reuse_actors=watch is not None,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(scratch),
                    stop=BudgetStopper(budget) if budget else None,
                    callbacks=callbacks,
                    failure_config=tune.FailureConfig(max_failures=MAX_MACHINE_FAILURES),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    verbose=0,
                ),
            )
            with (
                giving_up(),
                lost_processes_are_failures(),
                nothing_unpickled(),
                saving_when_interrupted(self.study_id, lambda: callback.running, self.on_interrupt),
            ):
                tuner.fit()
                search.check_storage()

    @property
    def _demand(self) -> Demand:
        return trial_demand(self.config.trial.training, self.config.resources)

    def _workplace(self, tables: Mapping[str, Tables]) -> WorkerContext:
        resources = self.config.resources
        return WorkerContext(
            {key: found.to_mapping() for key, found in tables.items()},
            self.config.folder / TRIALS_FOLDER,
            resources.cpus_per_worker,
            "cuda" if resources.worker_gpus(1) else "cpu",
            self.artifacts.trials,
            self.artifacts.shelf,
            token=self.cluster.token,
            study_id=self.study_id,
            hang_seconds=resources.hang_seconds,
        )

    def _watch(self) -> HeartbeatMonitor | None:
        """Sees that resident actors run; workers of Ray Train have a guard of their own."""
        if self.config.trial.training.max_workers > 1:
            return None
        return HeartbeatMonitor(self.study_id, self.config.resources.hang_seconds)

    def _drop_resumable(self, number: int) -> None:
        folder: Path = self.config.folder / TRIALS_FOLDER
        trial_folder(folder, number, self.artifacts.trials).drop_resumable()


def tune_trainable(config: StudyConfig, workplace: WorkerContext, capacity: Capacity) -> Any:
    """A trainable with its resources."""
    # Tune would write the driver's keys into each actor's description, for all users of the
    # cluster to read. A node has its own.
    passed_on = class_cache.ENV_VARS_TO_PROPAGATE
    passed_on.difference_update({name for name in passed_on if name.startswith("AWS_")})
    if config.trial.training.max_workers == 1:
        bound = tune.with_parameters(TrialActor, workplace=workplace)
        return tune.with_resources(
            bound,
            {
                "CPU": config.resources.cpus_per_worker,
                "GPU": config.resources.worker_gpus(1),
            },
        )
    bound = tune.with_parameters(
        drive_trial,
        workplace=workplace,
        resources=config.resources,
        num_workers=config.trial.training.max_workers,
    )
    return tune.with_resources(bound, capacity.driver_resources())
