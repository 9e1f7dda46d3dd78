"""run_training: one configuration on Ray Train, recorded as a run of its own."""

from __future__ import annotations

import logging
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drtune_ray.config import NAME_PATTERN, ResourcesConfig, TrackingConfig, TrialConfig
from drtune_ray.data.store import TableStore
from drtune_ray.errors import ConfigError, DrtuneError, EnvironmentProblem
from drtune_ray.results.winner import read_winner, write_winner
from drtune_ray.search.actor import Workplace
from drtune_ray.search.identity import (
    DONE_NAME,
    RECORD_FILE,
    SCRATCH_NAME,
    SPLITS_NAME,
    SPOOL_NAME,
    TRAINING,
    TRIALS_FOLDER,
    WINNER_NAME,
    deciding_values,
    driver_lease,
    open_record,
    read_record,
)
from drtune_ray.search.nodes import trial_demand
from drtune_ray.search.prepare import (
    Checked,
    check_inputs,
    data_root,
    manifest_path,
    prepare,
    preparing_device,
    write_manifest,
)
from drtune_ray.search.protocol import OBJECTIVE, OUT_OF_MEMORY, OUTCOME
from drtune_ray.search.servers import StudyArtifacts
from drtune_ray.search.session import ready_cluster, scratch_folder, signals_as_interrupt
from drtune_ray.search.shared import Cluster, shared_folder
from drtune_ray.search.waiting import Notify, ResourceWait
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
from drtune_ray.training.checkpoint import trial_folder
from drtune_ray.training.records import COMPLETED, PATIENCE, EpochRecord
from drtune_ray.values import flattened

logger = logging.getLogger(__name__)


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
    artifacts: str | None = None,
    observer: Sink | None = None,
    on_notice: Notify = logger.warning,
) -> TrainingResult:
    """Train one configuration with ``training.workers`` workers; the same call resumes.

    Args:
        config: The trial.
        name: Of its folder under the storage.
        storage: Where everything goes.
        resources: What a worker takes.
        tracking: Where MLflow records.
        artifacts: URI of what the next driver needs; None: everything lies under the storage.
        observer: Takes the events as they happen.
        on_notice: Takes a line while the workers cannot start.

    Raises:
        ConfigError: For bad input, or a name taken by another configuration.
        EnvironmentProblem: If the machine cannot hold the workers.
        DrtuneError: If the loss diverged or the workers failed.
    """
    if not re.match(NAME_PATTERN, name):
        raise ConfigError(f"name={name!r} is not valid: use letters, digits, '.', '_' and '-'")
    storage, resources = storage.expanduser().resolve(), resources or ResourcesConfig()
    kept = StudyArtifacts(artifacts, storage / name)
    kept.restore_shared(manifest_path(config.data, storage))
    checked = check_inputs(config, storage)
    config = config.with_values({"data.train": str(data_root(config.data))})
    values = config.to_mapping()
    deciding = deciding_values(values, checked.splits.content_digest(), checked.backbone.digest)
    folder = storage / name
    joining = ready_cluster(config.training, resources, with_dashboard=True)
    with (
        nullcontext() if (folder / DONE_NAME).exists() else joining as capacity,
        driver_lease(folder),
        kept.lease(),
        signals_as_interrupt(),
        shared_folder(folder, capacity, kept.trials) as token,
    ):
        tracking = tracking or TrackingConfig()
        kept.restore()
        record = open_record(folder, TRAINING, values, deciding, tracking, artifacts)
        spool = Spool(folder / SPOOL_NAME)
        was_done = (folder / DONE_NAME).exists()
        if not was_done and capacity:
            cluster = Cluster(capacity, token, on_notice)
            write_manifest(checked.splits, folder / SPLITS_NAME)
            kept.keep(RECORD_FILE, SPLITS_NAME)
            recorder = build_recorder(tracking, storage, record.study_id)
            with kept.unsent_kept(spool), BackgroundWriter(spool, recorder) as writer:
                emit = _both(writer.emit, observer)
                emit(RunStarted(None, name, flattened(values), {"drtune.kind": TRAINING}))
                _train_and_tell(config, checked, folder, resources, emit, kept, cluster)
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
    config: TrialConfig,
    checked: Checked,
    folder: Path,
    resources: ResourcesConfig,
    emit: Sink,
    kept: StudyArtifacts,
    cluster: Cluster,
) -> None:
    """Train, keep the model, and end the run in MLflow whatever happens."""
    try:
        result = _train(config, checked, folder, resources, emit, kept, cluster)
    except (KeyboardInterrupt, EnvironmentProblem):  # the same command goes on
        emit(RunFinished(None, "INTERRUPTED", "interrupted", {}, {}))
        raise
    except BaseException as error:  # whatever it was, the run may not stay RUNNING
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        emit(RunFinished(None, "FAIL", first_line, {}, {}))
        raise
    kept.keep(WINNER_NAME)
    emit(FilesReady(None, str(folder / WINNER_NAME), WINNER_NAME))
    emit(RunFinished(None, "COMPLETE", result[OUTCOME], {}, {}))
    (folder / DONE_NAME).write_text(result[OUTCOME])
    kept.keep(DONE_NAME)
    # Last: who is killed before finds the end of the training in its checkpoint.
    trial_folder(folder / TRIALS_FOLDER, 0, kept.trials).drop_resumable()


def _train(
    config: TrialConfig,
    checked: Checked,
    folder: Path,
    resources: ResourcesConfig,
    emit: Sink,
    kept: StudyArtifacts,
    cluster: Cluster,
) -> dict[str, Any]:
    """Train on Ray Train and write the winner; returns the last result.

    Raises:
        DrtuneError: If the loss diverged or the workers failed.
    """
    device, notes = preparing_device(resources, cluster.capacity)
    for note in notes:
        cluster.on_notice(note)
    demand = trial_demand(config.training, resources)
    wait = ResourceWait(demand, resources.wait_seconds, cluster.on_notice)
    checkpoints = trial_folder(folder / TRIALS_FOLDER, 0, kept.trials)
    with (
        scratch_folder(folder / SCRATCH_NAME) as scratch,
        TableStore(folder.parent, config.data.cache_limit_gib, kept.shelf) as store,
    ):
        tables = prepare(checked, config, store, device)
        kept.keep_shared(manifest_path(config.data, store.storage))
        workplace = Workplace(
            tables.to_mapping(),
            checkpoints.path.parent,
            resources.cpus_per_worker,
            "cuda" if demand.num_gpus else "cpu",
            kept.trials,
            kept.shelf,
            token=cluster.token,
            study_id=read_record(folder).study_id,
            hang_seconds=resources.hang_seconds,
        )
        result = train_on_workers(
            config,
            workplace,
            resources,
            checkpoints,
            scratch,
            lambda record: _tell_epoch(record, emit),
            wait.check,
        )
    if result[OUTCOME] not in (COMPLETED, PATIENCE):
        raise DrtuneError(_advice(result[OUTCOME], config))
    about = {
        "study": folder.name,
        "val_accuracy": result[OBJECTIVE],
        "outcome": result[OUTCOME],
        "chosen": "best epoch of one training, by validation accuracy",
    }
    write_winner(
        folder / WINNER_NAME,
        checkpoints.fetch_best(),
        tables.backbone,
        tables.classes,
        config,
        about,
    )
    return result


def _advice(outcome: str, config: TrialConfig) -> str:
    """What to do about a configuration that cannot be trained."""
    if outcome == OUT_OF_MEMORY:
        return (
            f"the GPU's memory does not hold this training: lower "
            f"training.batch_size={config.training.batch_size} or "
            f"data.image_size={config.data.image_size}, or add workers"
        )
    return (
        f"training {outcome}: lower optim.backbone_lr={config.optim.backbone_lr} or "
        f"method.head_lr_multiplier={config.method.head_lr_multiplier}"
    )


def _tell_epoch(record: EpochRecord, emit: Sink) -> None:
    emit(MetricsRecorded(None, record.epoch, record.metrics, record.time_ms))
    first = (record.epoch - 1) * len(record.steps) + 1
    emit(StepsRecorded(None, first, record.steps, record.time_ms))
