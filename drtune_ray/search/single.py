"""run_training: one configuration on Ray Train, recorded as a run of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drtune_ray.config import TrialConfig
from drtune_ray.data.artifacts import LocalFolder
from drtune_ray.data.dataset import Tables
from drtune_ray.data.store import TableStore
from drtune_ray.errors import ConfigError, DrtuneError, EnvironmentProblem
from drtune_ray.results.winner import read_winner, write_winner
from drtune_ray.search.actor import Workplace
from drtune_ray.search.failures import FULL_DISK, full_disk_is_told
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
    former_record,
    open_record,
)
from drtune_ray.search.interruption import saving_when_interrupted
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
from drtune_ray.search.servers import StudyArtifacts, as_problem, check_tracking
from drtune_ray.search.session import ready_cluster, scratch_folder, signals_as_interrupt
from drtune_ray.search.shared import Cluster, shared_folder
from drtune_ray.search.waiting import Notify, ResourceWait
from drtune_ray.search.workers import controllers_ended, train_on_workers
from drtune_ray.study_sections import ResourcesConfig, TrackingConfig, study_name
from drtune_ray.tracking.events import (
    FilesReady,
    MetricsRecorded,
    RunFinished,
    RunStarted,
    Sink,
    StepsRecorded,
    fan_out,
)
from drtune_ray.tracking.mlflow_recorder import build_recorder
from drtune_ray.tracking.spool import BackgroundWriter, Spool
from drtune_ray.training.checkpoint import TrialFolder, trial_folder
from drtune_ray.training.records import COMPLETED, PATIENCE, EpochRecord
from drtune_ray.values import flattened, full_path

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
    try:
        study_name(name)
    except ValueError as error:
        raise ConfigError(f"name: {error}") from None
    storage, resources = full_path(storage), resources or ResourcesConfig()
    kept = StudyArtifacts(artifacts, storage / name)
    kept.restore_shared(manifest_path(config.data, storage))
    tracking = tracking or TrackingConfig()
    others = [
        lambda: trial_demand(config.training, resources),
        lambda: check_tracking(tracking.uri),
    ]
    checked = check_inputs(config, storage, others, resources)
    config = config.with_values({"data.train": str(data_root(config.data))})
    values = config.to_mapping()
    deciding = deciding_values(values, checked.splits.content_digest(), checked.weights_digest)
    folder = storage / name
    former_record(folder, TRAINING, deciding)  # a taken name is told before Ray is started
    joining = ready_cluster(config.training, resources, with_dashboard=True)
    with (
        full_disk_is_told(folder),
        nullcontext() if (folder / DONE_NAME).exists() else joining as capacity,
        driver_lease(folder),
        kept.lease(),
        signals_as_interrupt(),
        shared_folder(folder, capacity, kept.trials) as token,
    ):
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
                _Training(
                    config,
                    checked,
                    folder,
                    record.study_id,
                    resources,
                    kept,
                    cluster,
                    fan_out(writer.emit, observer),
                    lambda: writer.disk_error,
                ).run()
        about = read_winner(folder / WINNER_NAME).about
        return TrainingResult(
            folder, about["val_accuracy"], about["outcome"], spool.num_unsent(), was_done
        )


@dataclass(frozen=True)
class _Training:
    """One run of a training in this process."""

    config: TrialConfig
    checked: Checked
    folder: Path
    study_id: str
    resources: ResourcesConfig
    kept: StudyArtifacts
    cluster: Cluster
    emit: Sink
    disk_error: Callable[[], OSError | None]

    def run(self) -> None:
        """Train, keep the model, and end the run in MLflow whatever happens."""
        params = flattened(self.config.to_mapping())
        self.emit(RunStarted(None, self.folder.name, params, {"drtune.kind": TRAINING}))
        try:
            outcome = self._train_and_write()
        except (KeyboardInterrupt, EnvironmentProblem):
            self._tell_interruption()
            raise
        except BaseException as error:  # whatever it was, the run may not stay RUNNING
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            self.emit(RunFinished(None, "FAIL", first_line, {}, {}))
            raise
        self.kept.keep(WINNER_NAME)
        self.emit(FilesReady(None, str(self.folder / WINNER_NAME), WINNER_NAME))
        self.emit(RunFinished(None, "COMPLETE", outcome, {}, {}))
        LocalFolder(self.folder).write(DONE_NAME, outcome.encode())
        self.kept.keep(DONE_NAME)
        # Last: who is killed before finds the end of the training in its checkpoint.
        self._checkpoints.drop_resumable()

    @property
    def _checkpoints(self) -> TrialFolder:
        return trial_folder(self.folder / TRIALS_FOLDER, 0, self.kept.trials)

    def _train_and_write(self) -> str:
        """Train on Ray Train and write the winner; returns the outcome.

        Raises:
            DrtuneError: If the loss diverged or the workers failed.
        """
        device, notes = preparing_device(self.resources, self.cluster.capacity)
        for note in notes:
            self.cluster.on_notice(note)
        limit = self.config.data.cache_limit_gib
        with TableStore(self.folder.parent, limit, self.kept.shelf) as store:
            tables = prepare(self.checked, self.config, store, device)
            self.kept.keep_shared(manifest_path(self.config.data, store.storage))
            result = self._train(tables)
        if result[OUTCOME] not in (COMPLETED, PATIENCE):
            raise DrtuneError(_advice(result[OUTCOME], self.config))
        about = {
            "study": self.folder.name,
            "val_accuracy": result[OBJECTIVE],
            "outcome": result[OUTCOME],
            "chosen": "best epoch of one training, by validation accuracy",
        }
        with as_problem(self.kept.uri):
            best = self._checkpoints.fetch_best()
        write_winner(
            self.folder / WINNER_NAME, best, tables.backbone, tables.classes, self.config, about
        )
        return str(result[OUTCOME])

    def _train(self, tables: Tables) -> dict[str, Any]:
        """The last result."""
        demand = trial_demand(self.config.training, self.resources)
        wait = ResourceWait(demand, self.resources.wait_seconds, self.cluster.on_notice)
        folder = self._checkpoints

        def on_turn() -> None:
            self.kept.check_lease()
            wait.check()
            if (error := self.disk_error()) is not None and error.errno in FULL_DISK:
                raise error

        with (
            scratch_folder(self.folder / SCRATCH_NAME) as scratch,
            controllers_ended(),
            saving_when_interrupted(
                self.study_id, lambda: [folder.path.name], self._tell_interruption
            ),
        ):
            return train_on_workers(
                self.config,
                self._workplace(tables, "cuda" if demand.num_gpus else "cpu"),
                self.resources,
                folder,
                scratch,
                lambda record: _tell_epoch(record, self.emit),
                on_turn,
            )

    def _workplace(self, tables: Tables, device: str) -> Workplace:
        return Workplace(
            {self.config.tables_key: tables.to_mapping()},
            self.folder / TRIALS_FOLDER,
            self.resources.cpus_per_worker,
            device,
            self.kept.trials,
            self.kept.shelf,
            token=self.cluster.token,
            study_id=self.study_id,
            hang_seconds=self.resources.hang_seconds,
        )

    def _tell_interruption(self) -> None:
        """The same command goes on."""
        self.emit(RunFinished(None, "INTERRUPTED", "interrupted", {}, {}))


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
