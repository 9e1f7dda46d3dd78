"""run_training: one configuration on Ray Train, recorded as a run of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drtune_ray.config import NAME_PATTERN, ResourcesConfig, TrackingConfig, TrialConfig, flattened
from drtune_ray.data.store import TableStore
from drtune_ray.errors import ConfigError, DrtuneError
from drtune_ray.results.winner import read_winner, write_winner
from drtune_ray.search.actor import Workplace
from drtune_ray.search.identity import (
    DONE_NAME,
    SCRATCH_NAME,
    SPLITS_NAME,
    SPOOL_NAME,
    TRAINING,
    TRIALS_FOLDER,
    WINNER_NAME,
    deciding_values,
    driver_lease,
    open_record,
)
from drtune_ray.search.prepare import (
    Checked,
    check_device,
    check_inputs,
    data_root,
    prepare,
    write_manifest,
)
from drtune_ray.search.protocol import OBJECTIVE, OUTCOME
from drtune_ray.search.session import (
    ray_session,
    scratch_folder,
    signals_as_interrupt,
    trials_that_fit,
)
from drtune_ray.search.workers import train_on_workers
from drtune_ray.tracking.events import (
    Event,
    FilesReady,
    MetricsRecorded,
    RunFinished,
    RunStarted,
    Sink,
    StepsRecorded,
)
from drtune_ray.tracking.mlflow_recorder import build_recorder
from drtune_ray.tracking.spool import BackgroundWriter, Spool
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.records import COMPLETED, PATIENCE, EpochRecord


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        folder: Where it lies; the model is in its ``winner`` folder.
        val_accuracy: Of the best epoch, 0 to 1.
        outcome: Why it ended.
        num_unsent: Events that the tracking server has not taken yet.
        was_done: Whether there was nothing left to train.
    """

    folder: Path
    val_accuracy: float
    outcome: str
    num_unsent: int
    was_done: bool


def run_training(
    config: TrialConfig,
    name: str,
    storage: Path,
    *,
    resources: ResourcesConfig | None = None,
    tracking: TrackingConfig | None = None,
    observer: Sink | None = None,
) -> TrainingResult:
    """Train one configuration with ``training.workers`` workers; the same call resumes.

    Args:
        config: The trial.
        name: Of its folder under the storage.
        storage: Where everything goes.
        resources: What a worker takes.
        tracking: Where MLflow records.
        observer: Takes the events as they happen.

    Raises:
        ConfigError: For bad input, or a name taken by another configuration.
        EnvironmentProblem: If the machine cannot hold the workers.
        DrtuneError: If the loss diverged or the workers failed.
    """
    if not re.match(NAME_PATTERN, name):
        raise ConfigError(f"name={name!r} is not valid: use letters, digits, '.', '_' and '-'")
    storage, resources = storage.expanduser().resolve(), resources or ResourcesConfig()
    check_device(resources)
    checked = check_inputs(config, storage)
    config = config.with_values({"data.train": str(data_root(config.data))})
    values = config.to_mapping()
    deciding = deciding_values(values, checked.splits.content_digest(), checked.backbone.digest)
    folder = storage / name
    with driver_lease(folder), signals_as_interrupt():
        tracking = tracking or TrackingConfig()
        record = open_record(folder, TRAINING, values, deciding, tracking)
        spool = Spool(folder / SPOOL_NAME)
        was_done = (folder / DONE_NAME).exists()
        if not was_done:
            write_manifest(checked.splits, folder / SPLITS_NAME)
            recorder = build_recorder(tracking, storage, record.study_id)
            with BackgroundWriter(spool, recorder) as writer:
                emit = _both(writer.emit, observer)
                emit(RunStarted(None, name, flattened(values), {"drtune.kind": TRAINING}))
                _train_and_tell(config, checked, folder, resources, emit)
        about = read_winner(folder / WINNER_NAME).about
        return TrainingResult(
            folder, about["val_accuracy"], about["outcome"], spool.num_unsent(), was_done
        )


def _both(first: Sink, second: Sink | None) -> Sink:
    def emit(event: Event) -> None:
        first(event)
        if second:
            second(event)

    return emit


def _train_and_tell(
    config: TrialConfig, checked: Checked, folder: Path, resources: ResourcesConfig, emit: Sink
) -> None:
    """Train, keep the model, and end the run in MLflow whatever happens."""
    try:
        result = _train(config, checked, folder, resources, emit)
    except KeyboardInterrupt:
        emit(RunFinished(None, "INTERRUPTED", "interrupted", {}, {}))
        raise
    except BaseException as error:  # whatever it was, the run may not stay RUNNING
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        emit(RunFinished(None, "FAIL", first_line, {}, {}))
        raise
    emit(FilesReady(None, str(folder / WINNER_NAME), WINNER_NAME))
    emit(RunFinished(None, "COMPLETE", result[OUTCOME], {}, {}))
    (folder / DONE_NAME).write_text(result[OUTCOME])


def _train(
    config: TrialConfig, checked: Checked, folder: Path, resources: ResourcesConfig, emit: Sink
) -> dict[str, Any]:
    """Train on Ray Train and write the winner; returns the last result.

    Raises:
        DrtuneError: If the loss diverged or the workers failed.
    """
    device = "cuda" if resources.gpus_per_worker else "cpu"
    trial_folder = TrialFolder(folder / TRIALS_FOLDER / "00000")
    with (
        ray_session(with_dashboard=True) as capacity,
        scratch_folder(folder / SCRATCH_NAME) as scratch,
        TableStore(folder.parent, config.data.cache_limit_gib) as store,
    ):
        trials_that_fit(config.training.min_workers, resources, capacity)
        tables = prepare(checked, config, store, device)
        workplace = Workplace(
            tables.to_mapping(), trial_folder.path.parent, resources.cpus_per_worker, device
        )
        result = train_on_workers(
            config,
            workplace,
            resources,
            trial_folder.path,
            scratch,
            lambda record: _tell_epoch(record, emit),
        )
    if result[OUTCOME] not in (COMPLETED, PATIENCE):
        raise DrtuneError(
            f"training {result[OUTCOME]}: lower optim.backbone_lr={config.optim.backbone_lr} or "
            f"method.head_lr_multiplier={config.method.head_lr_multiplier}"
        )
    about = {
        "study": folder.name,
        "val_accuracy": result[OBJECTIVE],
        "outcome": result[OUTCOME],
        "chosen": "best epoch of one training, by validation accuracy",
    }
    write_winner(
        folder / WINNER_NAME, trial_folder.best, tables.backbone, tables.classes, config, about
    )
    trial_folder.drop_resumable()
    return result


def _tell_epoch(record: EpochRecord, emit: Sink) -> None:
    emit(MetricsRecorded(None, record.epoch, record.metrics, record.time_ms))
    first = (record.epoch - 1) * len(record.steps) + 1
    emit(StepsRecorded(None, first, record.steps, record.time_ms))
