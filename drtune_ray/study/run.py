"""`run_study`: a study from its configuration to its winner; the same call resumes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from optuna.trial import FrozenTrial

from drtune_ray.config.study import STUDY, StudyConfig
from drtune_ray.data.splits import write_manifest
from drtune_ray.execution.capacity import Capacity
from drtune_ray.execution.resource_wait import Notify
from drtune_ray.execution.session import ready_cluster
from drtune_ray.folders import files_as_problem, source_location
from drtune_ray.results.evaluate import keep_openings
from drtune_ray.results.rebuilt import missing_of
from drtune_ray.search.objectives import direction
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.fingerprint import deciding_values, former_record, open_record
from drtune_ray.storage.journal import Missing
from drtune_ray.storage.optuna_storage import (
    check_storage_of,
    database_as_problem,
    open_storage,
    open_study,
)
from drtune_ray.storage.record import (
    RECORD_FILE,
    SPLITS_NAME,
    SPOOL_NAME,
    Record,
    find_study,
    is_done,
    read_record,
)
from drtune_ray.storage.stored_trials import stored_trials
from drtune_ray.study.checks import check_study, space_content, study_trainings
from drtune_ray.study.driver import StudyDriver
from drtune_ray.study.inputs import changed_images, manifest_path
from drtune_ray.study.opened import opened_study
from drtune_ray.study.result import StudyPlan, StudyResult
from drtune_ray.study.winner import is_finished
from drtune_ray.tracking.events import Sink
from drtune_ray.tracking.spool import Spool
from drtune_ray.values import full_path

logger = logging.getLogger(__name__)


@files_as_problem()
def run_study(
    config: StudyConfig,
    *,
    observer: Sink | None = None,
    on_plan: Callable[[StudyPlan], None] = lambda plan: None,
    on_notice: Notify = logger.warning,
    tags: Mapping[str, str] | None = None,
) -> StudyResult:
    """Run a study, or resume it, and choose the winner.

    Everything is checked before the first trial. If a study of this name exists, its unfinished
    trials are resumed first, then new ones follow up to ``config.trials``.

    Args:
        config: The study.
        observer: Takes the events of the run as they happen.
        on_plan: Called with a `StudyPlan` before the first trial.
        on_notice: Takes a line for the user while no trial can start.
        tags: Further tags of its run in MLflow.

    Raises:
        ConfigError: If the input is invalid, or the name belongs to another configuration.
        EnvironmentProblem: If the machine cannot run a trial or another process drives the study.
        NoTrialCompleted: If all trials ran and none completed.
        KeyboardInterrupt: If interrupted; the same call resumes the study.
    """
    artifacts = StudyArtifacts(config.artifacts, config.folder)
    artifacts.restore_shared(_manifest(config))
    _warm_start(config)  # fails if one is missing
    checked, space, references, notes = check_study(config)
    # Absolute, so that it is found from any working directory.
    trial = config.trial.with_values({"data.train": source_location(config.trial.data.train)})
    config = config.model_copy(update={"space": space_content(config), "trial": trial})
    values = config.to_mapping()
    deciding = deciding_values(values, checked.splits.content_digest(), checked.weights_digest)
    # Refuse a taken name before Ray starts.
    changes = partial(changed_images, config.folder, checked.splits)
    former_record(config.folder, STUDY, deciding, changes)
    with (
        opened_study(config.folder, artifacts, _cluster(config), on_notice) as opened,
        database_as_problem(config.optuna_storage),
    ):
        directions = [direction(objective) for objective in config.objectives]
        storage = open_storage(
            config.folder, config.optuna_storage, directions, partial(_missing, config)
        )
        if (config.folder / RECORD_FILE).exists():
            former = read_record(config.folder)
            check_storage_of(former, config.optuna_storage, storage, artifacts)
        record = open_record(
            config.folder, STUDY, values, deciding, config.tracking, config.artifacts, changes
        )
        write_manifest(checked.splits.manifest, config.folder / SPLITS_NAME)
        keep_openings(config.folder, config.folder.parent, artifacts.root)
        artifacts.keep(RECORD_FILE, SPLITS_NAME)
        study = open_study(storage, record.study_id, directions)
        driver = StudyDriver(
            config, study, artifacts, checked, space, references, notes, opened.cluster
        )
        if opened.cluster is not None:
            driver.learn_from([(r, stored_trials(r)) for r in _warm_start(config)], deciding)
        return driver.run(observer, on_plan, opened.is_restored, tags or {})


def _missing(config: StudyConfig, trials: Sequence[FrozenTrial]) -> dict[int, Missing]:
    """Return what the spool knows of trials that a damaged journal lost."""
    events = Spool(config.folder / SPOOL_NAME).events.events()
    return missing_of(trials, events, config.objectives)


def _warm_start(config: StudyConfig) -> tuple[Record, ...]:
    """Read the records of the earlier studies that this one learns from."""
    return tuple(read_record(find_study(name, config.storage)) for name in config.warm_start)


def _cluster(config: StudyConfig) -> AbstractContextManager[Capacity | None]:
    """Return the context that joins the cluster; it joins none if the study is done."""
    if is_finished(config):
        return nullcontext()
    trainings = study_trainings(config)
    # The final fit is run by Ray Train whatever its workers, and so is a trial whose weights are
    # lost.
    is_winner_lost = is_done(config.folder, config)
    is_nested = len(trainings) > 1 or config.trial.training.max_workers > 1
    with_dashboard = is_nested or is_winner_lost
    return ready_cluster(trainings, config.resources, with_dashboard=with_dashboard)


def _manifest(config: StudyConfig) -> Path:
    return manifest_path(config.trial.data, full_path(config.storage))
