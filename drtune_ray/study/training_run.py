"""run_training: one configuration on Ray Train, recorded as a run of its own."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from drtune_ray.config.study import TRAINING, ResourcesConfig, TrackingConfig, study_name
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.table_store import TableStore
from drtune_ray.errors import ConfigError, DrtuneError, EnvironmentProblem
from drtune_ray.execution.capacity import WORKERS, Cluster, trial_demand
from drtune_ray.execution.failures import full_disk_is_told
from drtune_ray.execution.interrupts import signals_as_interrupt
from drtune_ray.execution.ray_train.fit import Fit, advice
from drtune_ray.execution.resource_wait import Notify
from drtune_ray.execution.session import ready_cluster
from drtune_ray.execution.shared_storage import shared_folder
from drtune_ray.folders import LocalFolder, as_problem
from drtune_ray.results.winner import read_about, write_winner
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.driver_lock import driver_lock
from drtune_ray.storage.fingerprint import deciding_values, former_record, open_record
from drtune_ray.storage.record import (
    DONE_NAME,
    RECORD_FILE,
    SPLITS_NAME,
    SPOOL_NAME,
    TRIALS_FOLDER,
    WINNER_NAME,
)
from drtune_ray.study.inputs import (
    StudyInputs,
    check_inputs,
    data_root,
    manifest_path,
    write_manifest,
)
from drtune_ray.study.tables import prepare, preparing_device
from drtune_ray.tracking.events import FilesReady, RunFinished, RunStarted, Sink, fan_out
from drtune_ray.tracking.mlflow_recorder import build_recorder, check_tracking
from drtune_ray.tracking.spool import BackgroundWriter, Spool
from drtune_ray.training.checkpoint import TrialFolder, trial_folder
from drtune_ray.training.reports import COMPLETED, OBJECTIVE, OUTCOME, PATIENCE
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
    _check_name(name)
    storage, resources = full_path(storage), resources or ResourcesConfig()
    kept = StudyArtifacts(artifacts, storage / name)
    kept.restore_shared(manifest_path(config.data, storage))
    tracking = tracking or TrackingConfig()
    checked = _checked(config, storage, resources, tracking)
    config = config.with_values({"data.train": str(data_root(config.data))})
    values = config.to_mapping()
    deciding = deciding_values(values, checked.splits.content_digest(), checked.weights_digest)
    folder = storage / name
    former_record(folder, TRAINING, deciding)  # a taken name is told before Ray is started
    joining = ready_cluster({WORKERS: config.training}, resources, with_dashboard=True)
    with (
        full_disk_is_told(folder),
        nullcontext() if (folder / DONE_NAME).exists() else joining as capacity,
        driver_lock(folder),
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
                emit, lost = fan_out(writer.emit, observer), lambda: writer.disk_error
                fit = Fit(folder, record.study_id, resources, kept, cluster, emit, lost)
                _Training(config, checked, fit).run()
        return _result(folder, spool.num_unsent(), was_done=was_done)


def _result(folder: Path, num_unsent: int, *, was_done: bool) -> TrainingResult:
    about = read_about(folder / WINNER_NAME)
    return TrainingResult(folder, about["val_accuracy"], about["outcome"], num_unsent, was_done)


def _checked(
    config: TrialConfig, storage: Path, resources: ResourcesConfig, tracking: TrackingConfig
) -> StudyInputs:
    """Everything that can be seen without a cluster; see `check_inputs`."""
    others = [
        lambda: trial_demand(config.training, resources),
        lambda: check_tracking(tracking.uri),
    ]
    return check_inputs(config, storage, others, resources)


def _check_name(name: str) -> None:
    try:
        study_name(name)
    except ValueError as error:
        raise ConfigError(f"name: {error}") from None


@dataclass(frozen=True)
class _Training:
    """One run of a training in this process."""

    config: TrialConfig
    checked: StudyInputs
    fit: Fit

    def run(self) -> None:
        """Train, keep the model, and end the run in MLflow whatever happens."""
        params = flattened(self.config.to_mapping())
        self.fit.emit(RunStarted(None, self.fit.folder.name, params, {"drtune.kind": TRAINING}))
        try:
            outcome = self._train_and_write()
        except (KeyboardInterrupt, EnvironmentProblem):
            self._tell_interruption()
            raise
        except BaseException as error:  # whatever it was, the run may not stay RUNNING
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            self.fit.emit(RunFinished(None, "FAIL", first_line, {}, {}))
            raise
        self.fit.artifacts.keep(WINNER_NAME)
        self.fit.emit(FilesReady(None, str(self.fit.folder / WINNER_NAME), WINNER_NAME))
        self.fit.emit(RunFinished(None, "COMPLETE", outcome, {}, {}))
        LocalFolder(self.fit.folder).write(DONE_NAME, outcome.encode())
        self.fit.artifacts.keep(DONE_NAME)
        # Last: who is killed before finds the end of the training in its checkpoint.
        self._checkpoints.drop_resumable()

    @property
    def _checkpoints(self) -> TrialFolder:
        return trial_folder(self.fit.folder / TRIALS_FOLDER, 0, self.fit.artifacts.trials)

    def _train_and_write(self) -> str:
        """Train on Ray Train and write the winner; returns the outcome.

        Raises:
            DrtuneError: If the loss diverged or the workers failed.
        """
        device, notes = preparing_device(self.fit.resources, self.fit.cluster.capacity)
        for note in notes:
            self.fit.cluster.on_notice(note)
        limit = self.config.data.cache_limit_gib
        with TableStore(self.fit.folder.parent, limit, self.fit.artifacts.shelf) as store:
            tables = prepare(self.checked, self.config, store, device)
            self.fit.artifacts.keep_shared(manifest_path(self.config.data, store.storage))
            result = self.fit.train(
                self.config, tables, self._checkpoints, None, self._tell_interruption
            )
        if result[OUTCOME] not in (COMPLETED, PATIENCE):
            raise DrtuneError(advice(result[OUTCOME], self.config))
        about = {
            "study": self.fit.folder.name,
            "val_accuracy": result[OBJECTIVE],
            "outcome": result[OUTCOME],
            "chosen": "best epoch of one training, by validation accuracy",
        }
        with as_problem(self.fit.artifacts.uri):
            best = self._checkpoints.fetch_best()
        write_winner(
            self.fit.folder / WINNER_NAME, best, tables.backbone, tables.classes, self.config, about
        )
        return str(result[OUTCOME])

    def _tell_interruption(self) -> None:
        """The same command goes on."""
        self.fit.emit(RunFinished(None, "INTERRUPTED", "interrupted", {}, {}))
