"""Trials of several workers on Ray Train; `drtune-ray train` always comes this way."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from drtune_ray.config import ResourcesConfig, TrialConfig
from drtune_ray.errors import DrtuneError
from drtune_ray.search.actor import Workplace, Workshop
from drtune_ray.search.identity import SCRATCH_NAME
from drtune_ray.search.protocol import CONFIG_NUMBER, CONFIG_TRIAL, trial_result
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.records import EpochRecord, EpochReport

MAX_WORKER_FAILURES = 2
# Infinite by default: a request that cannot be placed would be retried for ever, in silence.
MAX_CONTROLLER_FAILURES = 3
COLLECTIVE_TIMEOUT_SECONDS = 1800


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs; returns the trial's last result."""
    workplace: Workplace = payload["workplace"]
    config = TrialConfig.from_mapping(json.loads(payload[CONFIG_TRIAL]))
    folder = TrialFolder(Path(payload["folder"]))
    result: dict[str, Any] = {}
    num_sent = 0
    workshop = Workshop(workplace, get_device())
    for event in workshop.epochs(config, folder):
        event.save(folder)
        if isinstance(event, EpochReport):
            result = trial_result(event, workplace.num_threads)
            if payload["queue"] is not None and ray.train.get_context().get_world_rank() == 0:
                for record in event.history[num_sent:]:
                    payload["queue"].put(record)
                num_sent = len(event.history)
            ray.train.report(result)
    return result


def build_trainer(
    config: TrialConfig,
    workplace: Workplace,
    resources: ResourcesConfig,
    folder: Path,
    *,
    name: str,
    scratch: Path,
    queue: Any = None,
    callbacks: list[Any] | None = None,
) -> TorchTrainer:
    """A TorchTrainer over ``training.workers`` workers.

    Args:
        config: The trial.
        workplace: The shared tables.
        resources: What a worker takes.
        folder: The trial's folder, for its checkpoints.
        name: Of the run; the same name resumes.
        scratch: Ray Train's own folder; disposable.
        queue: Receives the record of each epoch from rank 0.
        callbacks: Of Ray Train.
    """
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "workplace": workplace,
            CONFIG_TRIAL: json.dumps(config.to_mapping()),
            "folder": str(folder),
            "queue": queue,
        },
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.training.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(scratch),
            callbacks=callbacks or [],
            failure_config=ray.train.FailureConfig(
                max_failures=MAX_WORKER_FAILURES,
                controller_failure_limit=MAX_CONTROLLER_FAILURES,
            ),
        ),
    )


def drive_trial(config: dict[str, Any], workplace: Workplace, resources: ResourcesConfig) -> None:
    """A Tune function trainable: trains one trial of several workers."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    number = config[CONFIG_NUMBER]
    build_trainer(
        TrialConfig.from_mapping(json.loads(config[CONFIG_TRIAL])),
        workplace,
        resources,
        workplace.folder(number).path,
        name=f"trial-{tune.get_context().get_trial_id()}",
        scratch=workplace.trials_folder.parent / SCRATCH_NAME,
        callbacks=[TuneReportCallback()],
    ).fit()


def train_on_workers(
    config: TrialConfig,
    workplace: Workplace,
    resources: ResourcesConfig,
    folder: Path,
    scratch: Path,
    on_epoch: Callable[[EpochRecord], None],
) -> dict[str, Any]:
    """Train one configuration on Ray Train and tell each epoch as it ends.

    Returns:
        The trial's last result.

    Raises:
        DrtuneError: If the workers failed more often than they are retried.
    """
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})
    trainer = build_trainer(
        config,
        workplace,
        resources,
        folder,
        name=folder.name,
        scratch=scratch,
        queue=queue,
    )
    listener = threading.Thread(target=_listen, args=(queue, on_epoch), daemon=True)
    listener.start()
    try:
        result = _fit_in_thread(trainer)
    except ray.train.TrainingFailedError as error:
        raise DrtuneError(f"training failed: {error}") from error
    queue.put(None)
    listener.join(timeout=30)
    queue.shutdown()
    returned: dict[str, Any] = result.return_value
    return returned


def _fit_in_thread(trainer: TorchTrainer) -> Any:
    """``trainer.fit()`` off the main thread: on it, Ray would take Ctrl-C and leave with code 0."""
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:  # raised again on the main thread
            outcome.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _listen(queue: Any, on_epoch: Callable[[EpochRecord], None]) -> None:
    while (record := queue.get()) is not None:
        on_epoch(record)
