"""`run_training`: one configuration on Ray Train, recorded as a run of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric
from drtune_ray.config.study import TRAINING, ResourcesConfig, TrackingConfig, study_name
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.splits import write_manifest
from drtune_ray.data.table_store import TableStore
from drtune_ray.errors import ConfigError, DrtuneError, EnvironmentProblem, first_line
from drtune_ray.execution.capacity import WORKERS, trial_demand
from drtune_ray.execution.ray_train.fit import advice, fit
from drtune_ray.execution.resource_wait import Notify
from drtune_ray.execution.run_context import RunContext
from drtune_ray.execution.session import ready_cluster
from drtune_ray.folders import LocalFolder, as_problem, files_as_problem, source_location
from drtune_ray.results.evaluate import keep_openings
from drtune_ray.results.winner import is_sound, read_about, write_winner
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.fingerprint import deciding_values, former_record, open_record
from drtune_ray.storage.record import (
    DONE_NAME,
    RECORD_FILE,
    SPLITS_NAME,
    SPOOL_NAME,
    WINNER_NAME,
)
from drtune_ray.study.inputs import (
    StudyInputs,
    changed_images,
    check_inputs,
    manifest_path,
)
from drtune_ray.study.opened import opened_study
from drtune_ray.study.record_start import training_started
from drtune_ray.study.registration import model_ready
from drtune_ray.study.tables import prepare, preparing_device
from drtune_ray.tracking.events import FilesReady, RunFinished, Sink, fan_out
from drtune_ray.tracking.machine_watch import watched_writer
from drtune_ray.tracking.mlflow_recorder import build_recorder, check_tracking, ignored_variables
from drtune_ray.tracking.spool import Spool
from drtune_ray.tracking.writer import send_rest
from drtune_ray.training.checkpoint import trial_identity
from drtune_ray.training.reports import COMPLETED, OBJECTIVE, OUTCOME, PATIENCE
from drtune_ray.values import full_path

INTERRUPTED = RunFinished(None, "INTERRUPTED", "interrupted", {}, {})
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training.

    Attributes:
        folder: Folder of the training; the model is in its ``winner`` folder.
        val_accuracy: Validation accuracy of the best epoch, 0 to 1.
        metric: Metric that chose the best epoch.
        value: Its value at that epoch.
        outcome: Why it ended.
        num_unsent: Number of events that the tracking server has not received yet.
        was_done: Whether nothing was left to train.
    """

    folder: Path
    val_accuracy: float
    metric: Metric
    value: float
    outcome: str
    num_unsent: int
    was_done: bool


@files_as_problem()
def run_training(
    config: TrialConfig,
    name: str,
    storage: Path,
    *,
    resources: ResourcesConfig | None = None,
    tracking: TrackingConfig | None = None,
    artifacts: str | None = None,
    observer: Sink | None = None,
    on_plan: Callable[[Sequence[str]], None] = lambda notes: None,
    on_notice: Notify = logger.warning,
) -> TrainingResult:
    """Train one configuration with ``training.workers`` workers; the same call resumes.

    Args:
        config: The trial.
        name: Name of its folder under the storage.
        storage: Folder for all outputs.
        resources: Resources of a worker.
        tracking: Settings of MLflow.
        artifacts: URI for the files that the next driver needs; None keeps them in the storage.
        observer: Takes the events as they happen.
        on_plan: Called before the first epoch with sentences about images, weights and records.
        on_notice: Takes a line for the user while the workers cannot start.

    Raises:
        ConfigError: If the input is invalid, or the name belongs to another configuration.
        EnvironmentProblem: If the machine cannot hold the workers.
        DrtuneError: If the loss diverged or the workers failed.
    """
    _check_name(name)
    storage, resources = full_path(storage), resources or ResourcesConfig()
    kept = StudyArtifacts(artifacts, storage / name)
    kept.restore_shared(manifest_path(config.data, storage))
    tracking = tracking or TrackingConfig()
    checked = _checked(config, storage, resources, tracking)
    config = config.with_values({"data.train": source_location(config.data.train)})
    values = config.to_mapping()
    deciding = deciding_values(values, checked.splits.content_digest(), checked.weights_digest)
    folder = storage / name
    # Refuse a taken name before Ray starts.
    changes = partial(changed_images, folder, checked.splits)
    former_record(folder, TRAINING, deciding, changes)
    joining = ready_cluster({WORKERS: config.training}, resources, with_dashboard=True)
    is_done = _is_done(folder)
    with opened_study(folder, kept, nullcontext() if is_done else joining, on_notice) as opened:
        record = open_record(folder, TRAINING, values, deciding, tracking, artifacts, changes)
        spool = Spool(folder / SPOOL_NAME)
        was_done = _is_done(folder)
        if not was_done and opened.cluster:
            write_manifest(checked.splits.manifest, folder / SPLITS_NAME)
            keep_openings(folder, storage, kept.root)
            kept.keep(RECORD_FILE, SPLITS_NAME)
            on_plan((*checked.notes(), *ignored_variables(tracking)))
            recorder = build_recorder(tracking, storage, record.study_id)
            with kept.unsent_kept(spool), watched_writer(spool, recorder) as writer:
                emit = fan_out(writer.emit, observer)
                run = RunContext(
                    folder,
                    record.study_id,
                    resources,
                    kept,
                    opened.cluster,
                    emit,
                    disk_error=lambda: writer.disk_error,
                    on_interrupt=lambda: emit(INTERRUPTED),
                )
                _Training(config, checked, run).run()
        elif was_done:
            with kept.unsent_kept(spool):
                send_rest(spool, build_recorder(tracking, storage, record.study_id))
        return _result(folder, spool.num_unsent(), was_done=was_done)


def _is_done(folder: Path) -> bool:
    """Return whether a training has ended and its model is whole; a lost one is trained again."""
    return (folder / DONE_NAME).exists() and is_sound(folder / WINNER_NAME)


def _result(folder: Path, num_unsent: int, *, was_done: bool) -> TrainingResult:
    about = read_about(folder / WINNER_NAME)
    metric = METRICS[about.get("metric", DEFAULT_METRIC)]
    value = about[metric.measure]
    accuracy, outcome = about["val_accuracy"], about["outcome"]
    return TrainingResult(folder, accuracy, metric, value, outcome, num_unsent, was_done)


def _checked(
    config: TrialConfig, storage: Path, resources: ResourcesConfig, tracking: TrackingConfig
) -> StudyInputs:
    """Check the training without a cluster; see `check_inputs`."""
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
    context: RunContext

    def run(self) -> None:
        """Train, keep the model, and end the run in MLflow whatever happens."""
        context = self.context
        context.emit(training_started(context.folder.name, self.config, self.checked))
        try:
            outcome = self._train_and_write()
        except (KeyboardInterrupt, EnvironmentProblem):
            context.on_interrupt()
            raise
        except BaseException as error:  # whatever it was, the run may not stay RUNNING
            context.emit(RunFinished(None, "FAIL", first_line(error), {}, {}))
            raise
        context.artifacts.keep(WINNER_NAME)
        context.emit(FilesReady(None, str(context.folder / WINNER_NAME), WINNER_NAME))
        context.emit(model_ready(context.folder))
        context.emit(RunFinished(None, "COMPLETE", outcome, {}, {}))
        context.check_disk()
        LocalFolder(context.folder).write(DONE_NAME, outcome.encode())
        context.artifacts.keep(DONE_NAME)
        # Last: a driver killed before this finds the end of the training in its checkpoint.
        context.checkpoints(0).drop_resumable()

    def _train_and_write(self) -> str:
        """Train on Ray Train and write the winner; return the outcome.

        Raises:
            DrtuneError: If the loss diverged or the workers failed.
        """
        context = self.context
        device, notes = preparing_device(context.resources, context.cluster.capacity)
        for note in notes:
            context.cluster.on_notice(note)
        limit = self.config.data.cache_limit_gib
        with TableStore(context.folder.parent, limit, context.artifacts.shelf) as store:
            tables = prepare(self.checked, self.config, store, device)
            context.artifacts.keep_shared(manifest_path(self.config.data, store.storage))
            result = fit(context, self.config, tables, context.checkpoints(0), key=None)
        if result[OUTCOME] not in (COMPLETED, PATIENCE):
            raise DrtuneError(advice(result[OUTCOME], self.config))
        metric = METRICS[self.config.training.metric]
        about = {
            "study": context.folder.name,
            "metric": self.config.training.metric,
            metric.measure: result[OBJECTIVE],
            "outcome": result[OUTCOME],
            "chosen": f"best epoch of one training, by {metric.label}",
        }
        with as_problem(context.artifacts.uri):
            best = context.checkpoints(0).fetch_best()
        content = (best.parent.name, tables.images.name, tables.backbone.name)
        write_winner(
            context.folder / WINNER_NAME,
            best,
            tables.backbone,
            tables.classes,
            self.config,
            about,
            trial_identity(self.config, *content),
            self.checked.splits.whites,
        )
        return str(result[OUTCOME])
