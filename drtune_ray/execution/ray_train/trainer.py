"""Trials of several workers on Ray Train; `drtune-ray train` always uses it.

Ray Train itself restarts workers only if a machine was drained, or if their number changes. Any
other failure ends the run with the error of each worker. A failure that the configuration causes
becomes a result; one of the machine is retried by the caller: Tune for a trial of a study, else
`ray_train.fit.fit`.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.execution.guard import WorkerGuard
from drtune_ray.execution.ray_train.worker_group import (
    WorkerGroupCallbacks,
    start_seconds,
    train_environment,
)
from drtune_ray.execution.worker_context import WorkerContext, trial_of
from drtune_ray.storage.record import SCRATCH_NAME
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.reports import (
    CONFIG_NUMBER,
    EpochReport,
    failed_by_point,
    outcome_of_settings,
    trial_result,
)

logger = logging.getLogger(__name__)
# Infinite by default: workers that cannot start would be retried for ever, silently.
MAX_CONTROLLER_FAILURES = 3
# Workers that wait for a hanging one must wait longer than the guard that ends it.
COLLECTIVE_GRACE_SECONDS = 60
# Interval in seconds at which Ray Train checks whether more workers are available.
RESIZE_SECONDS = 60.0
# Time that a trial's driver waits for Tune to end it after the last result.
END_SECONDS = 600.0


class PointFailed(Exception):
    """Raised by a worker whose configuration cannot be trained further.

    Args:
        outcome: Name of the outcome.
        last: Last result of the worker.
    """

    def __init__(self, outcome: str, last: dict[str, Any]) -> None:
        super().__init__(outcome)
        self.outcome, self.last = outcome, last

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.outcome, self.last)

    def result(self) -> dict[str, Any]:
        """Return the last result of the trial."""
        return failed_by_point(self.outcome, self.last)


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train in a Ray Train worker; return the trial's last result.

    Raises:
        PointFailed: If the configuration cannot be trained further.
        Preempted: If one of the workers must leave; everything is saved.
    """
    context: WorkerContext = payload["context"]
    folder: TrialFolder = payload["folder"]
    rank = ray.train.get_context().get_world_rank()
    guard = WorkerGuard(context.study_id, context.hang_seconds)
    last: dict[str, Any] = {}
    num_sent = 0
    with guard.guarding(folder.path, rank):
        try:
            for event in _epochs(payload, guard):
                event.save(folder)
                if isinstance(event, EpochReport):
                    last = trial_result(event, context.num_threads)
                    if payload["queue"] is not None and rank == 0:
                        payload["queue"].put(event.history[num_sent:])
                        num_sent = len(event.history)
                    ray.train.report(last)
                    if event.outcome:
                        break
                guard.leave_if_told(event.settle)
        except Exception as error:
            if (outcome := outcome_of_settings(error)) is None:
                raise
            raise PointFailed(outcome, last) from error
    return last


def _epochs(payload: dict[str, Any], guard: WorkerGuard) -> Any:
    # The trial's driver and controller import this module too, and do not train.
    from drtune_ray.execution.worker import TrialRunner

    runner = TrialRunner(payload["context"], get_device())
    return runner.epochs(payload["trial"], payload["folder"], guard)


def build_trainer(
    config: TrialConfig,
    context: WorkerContext,
    resources: ResourcesConfig,
    folder: TrialFolder,
    *,
    name: str,
    scratch: Path,
    queue: Any = None,
    callbacks: list[Any] | None = None,
) -> TorchTrainer:
    """Build a TorchTrainer over ``training.workers`` workers.

    Args:
        config: The trial.
        context: What the workers share.
        resources: Resources of a worker.
        folder: Folder for the trial's checkpoints.
        name: Name of the run.
        scratch: Folder for Ray Train's own files; disposable.
        queue: Queue that receives the records of new epochs from rank 0, beginning with the first.
        callbacks: Callbacks of Ray Train.
    """
    training = config.training
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if gpus := resources.worker_gpus(training.min_workers):
        per_worker["GPU"] = gpus
    num_starts = math.ceil(resources.wait_seconds / start_seconds(resources, training))
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "context": context,
            "trial": config,
            "folder": folder,
            "queue": queue,
        },
        torch_config=TorchConfig(timeout_s=int(resources.hang_seconds) + COLLECTIVE_GRACE_SECONDS),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.workers,
            use_gpu=gpus > 0,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(scratch),
            callbacks=[
                WorkerGroupCallbacks(context.study_id, folder.path.name),
                *(callbacks or []),
            ],
            failure_config=ray.train.FailureConfig(
                max_failures=0,
                controller_failure_limit=max(MAX_CONTROLLER_FAILURES, num_starts),
            ),
        ),
    )


def drive_trial(
    config: dict[str, Any], context: WorkerContext, resources: ResourcesConfig, num_workers: int
) -> None:
    """Train one trial of several workers, as a Tune function trainable.

    A failure that the configuration causes becomes a result; only failures of the machine are
    exceptions, which Tune retries.

    Args:
        config: Tune's configuration of the trial.
        context: What the workers share.
        resources: Resources of a worker.
        num_workers: The study's present number of workers; a resumed trial may have had another.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    trial = trial_of(config).with_values({"training.workers": num_workers})
    tell_tune = TuneReportCallback()
    trainer = build_trainer(
        trial,
        context,
        resources,
        context.folder(config[CONFIG_NUMBER]),
        name=f"trial-{tune.get_context().get_trial_id()}",
        scratch=context.trials_folder.parent / SCRATCH_NAME,
        callbacks=[tell_tune],
    )
    try:
        with train_environment(resources, trial.training):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        if (point := point_failed(error)) is None:
            raise
        tell_tune.after_report(None, [point.result()], None)
    # Tune ends the trial when it has read the last result. Returning earlier would put another
    # result into a queue of one, where Tune's own thread may be about to put the last one: it would
    # wait for itself (Ray 2.60, `_TrainSession._get_result_from_queues`).
    time.sleep(END_SECONDS)


def point_failed(error: BaseException) -> PointFailed | None:
    """Return the `PointFailed` that a worker raised, if one did."""
    failures = getattr(error, "worker_failures", {}).values()
    return next((failure for failure in failures if isinstance(failure, PointFailed)), None)
