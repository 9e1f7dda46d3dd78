"""Looking at a study or training that has run: testing its winner, its MLflow store."""

from __future__ import annotations

import logging

from drtune_ray.config.study import STUDY, StudyConfig, TrackingConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.folders import open_folder
from drtune_ray.results.evaluate import Evaluation, evaluate
from drtune_ray.search.prepare import data_root
from drtune_ray.storage.record import (
    SPLITS_NAME,
    SPOOL_NAME,
    WINNER_NAME,
    Record,
    find_study,
    read_record,
)
from drtune_ray.tracking.events import MetricsRecorded
from drtune_ray.tracking.mlflow_recorder import build_recorder, default_tracking_uri
from drtune_ray.tracking.spool import Spool, send_unsent

logger = logging.getLogger(__name__)


def evaluate_study(name_or_folder: str, storage: str, *, again: bool = False) -> Evaluation:
    """Open the sealed test split for a winner, and record what it said.

    Raises:
        ConfigError: If there is no such study or winner, or the split was opened before.
    """
    record = read_record(find_study(name_or_folder, storage))
    found = evaluate(
        record.folder / WINNER_NAME,
        record.folder / SPLITS_NAME,
        data_root(_trial(record).data),
        record.folder.parent,
        artifacts=open_folder(record.artifacts) if record.artifacts else None,
        again=again,
    )
    metrics = {"test_accuracy": found.test.share, "test_openings": float(found.num_openings)}
    Spool(record.folder / SPOOL_NAME).append(MetricsRecorded(None, 0, metrics))
    # A server that is away must not hide the answer: the event waits in the spool.
    try:
        sync_study(name_or_folder, storage)
    except EnvironmentProblem as error:
        logger.warning("%s; `drtune-ray sync` sends the result later", error)
    return found


def tracking_of(name_or_folder: str, storage: str) -> tuple[str, str]:
    """Where MLflow keeps a study: tracking URI and the name of the experiment."""
    record = read_record(find_study(name_or_folder, storage))
    tracking = TrackingConfig(**record.tracking)
    return tracking.uri or default_tracking_uri(record.folder.parent), tracking.experiment


def sync_study(name_or_folder: str, storage: str) -> int:
    """Send MLflow the events that it has not taken; returns their number.

    Raises:
        EnvironmentProblem: If it cannot be reached.
    """
    record = read_record(find_study(name_or_folder, storage))
    recorder = build_recorder(
        TrackingConfig(**record.tracking), record.folder.parent, record.study_id
    )
    try:
        return send_unsent(Spool(record.folder / SPOOL_NAME), recorder)
    except Exception as error:  # whatever the server or its client raises
        raise EnvironmentProblem(f"MLflow did not take the events: {error}") from error


def _trial(record: Record) -> TrialConfig:
    if record.kind == STUDY:
        return StudyConfig.from_mapping(record.config).trial
    return TrialConfig.from_mapping(record.config)
