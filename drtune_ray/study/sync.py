"""Sending the events that the tracking server missed."""

from __future__ import annotations

from drtune_ray.config.study import TrackingConfig
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.storage.record import SPOOL_NAME, find_study, read_record
from drtune_ray.tracking.mlflow_recorder import build_recorder, default_tracking_uri
from drtune_ray.tracking.spool import Spool, send_unsent


def tracking_of(name_or_folder: str, storage: str) -> tuple[str, str]:
    """Return MLflow's tracking URI and experiment name of a study."""
    record = read_record(find_study(name_or_folder, storage))
    tracking = TrackingConfig(**record.tracking)
    return tracking.uri or default_tracking_uri(record.folder.parent), tracking.experiment


def sync_study(name_or_folder: str, storage: str) -> int:
    """Send MLflow the events that it has not received; return their number.

    Raises:
        EnvironmentProblem: If MLflow cannot be reached.
    """
    record = read_record(find_study(name_or_folder, storage))
    recorder = build_recorder(
        TrackingConfig(**record.tracking), record.folder.parent, record.study_id
    )
    try:
        return send_unsent(Spool(record.folder / SPOOL_NAME), recorder)
    except Exception as error:  # whatever the server or its client raises
        raise EnvironmentProblem(f"MLflow did not take the events: {error}") from error
