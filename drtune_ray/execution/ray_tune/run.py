"""One part of a study on Ray Tune: the search, or its finalists."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import TrialScheduler

from drtune_ray.config.study import StudyConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.execution.capacity import Capacity, trial_demand, trials_that_fit
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
from drtune_ray.execution.run_context import RunContext
from drtune_ray.execution.session import scratch_folder
from drtune_ray.execution.worker_context import WorkerContext
from drtune_ray.search.budget import Budget

MAX_MACHINE_FAILURES = 2


@dataclass(frozen=True)
class TuneRun:
    """A queue of trials of a study on Ray Tune.

    Attributes:
        config: The study.
        context: The study's run.
    """

    config: StudyConfig
    context: RunContext

    @property
    def trials_at_a_time(self) -> int:
        """Number of trials that run side by side."""
        demand = trial_demand(self.config.trial.training, self.config.resources)
        return trials_that_fit(demand, self.config.resources, self.context.cluster.capacity)

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
            search: Searcher that proposes trials and records their outcomes.
            tables: Tables of images and features by `TrialConfig.tables_key`.
            scheduler: Scheduler that stops trials early; None lets each run to its end.
            budget: Budget of the study, which may stop running trials.
        """
        context, watch = self.context, self._watch()
        callback = StudyCallback(search, context, watch)
        callbacks = [callback, WaitCallback(context.resource_wait(self.config.trial.training))]
        if watch is None:
            callbacks.append(PlacementGroupCleaner(self._drop_resumable))
        # Our callback logs a trial's error in one line.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        # Tune's own folder is disposable: Optuna's storage and the trials' folders hold everything.
        with scratch_folder(context.scratch) as scratch:
            tuner = tune.Tuner(
                tune_trainable(
                    self.config, context.worker_context(tables), context.cluster.capacity
                ),
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
                saving_when_interrupted(
                    context.study_id, lambda: callback.running, context.on_interrupt
                ),
            ):
                tuner.fit()
                search.check_storage()

    def _watch(self) -> HeartbeatMonitor | None:
        """Return the monitor of resident actors; Ray Train's workers have a guard of their own."""
        if self.config.trial.training.max_workers > 1:
            return None
        return HeartbeatMonitor(self.context.study_id, self.config.resources.hang_seconds)

    def _drop_resumable(self, number: int) -> None:
        self.context.checkpoints(number).drop_resumable()


def tune_trainable(config: StudyConfig, context: WorkerContext, capacity: Capacity) -> Any:
    """Return a trainable with its resources."""
    # Tune would write the driver's keys into each actor's description, for all users of the
    # cluster to read. A node has its own.
    passed_on = class_cache.ENV_VARS_TO_PROPAGATE
    passed_on.difference_update({name for name in passed_on if name.startswith("AWS_")})
    if config.trial.training.max_workers == 1:
        bound = tune.with_parameters(TrialActor, context=context)
        return tune.with_resources(
            bound,
            {
                "CPU": config.resources.cpus_per_worker,
                "GPU": config.resources.worker_gpus(1),
            },
        )
    bound = tune.with_parameters(
        drive_trial,
        context=context,
        resources=config.resources,
        num_workers=config.trial.training.max_workers,
    )
    return tune.with_resources(bound, capacity.driver_resources())
