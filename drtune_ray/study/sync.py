"""Sending the events that the tracking server missed, and finding its page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from drtune_ray.config.study import TrackingConfig
from drtune_ray.errors import DrtuneError, EnvironmentProblem
from drtune_ray.folders import files_as_problem
from drtune_ray.storage.record import SPOOL_NAME, find_study, read_record
from drtune_ray.tracking.mlflow_client import artifacts_folder, default_tracking_uri
from drtune_ray.tracking.mlflow_recorder import build_recorder
from drtune_ray.tracking.spool import Spool
from drtune_ray.tracking.views import runs_page
from drtune_ray.tracking.writer import send_events, send_files


@files_as_problem()
def page_of(name_or_folder: str, storage: str) -> tuple[str, str | None]:
    """Return MLflow's tracking URI of a study, and the path of its page in MLflow's UI.

    The path is None if the tracking URI is that of a server, which has the page.

    Raises:
        EnvironmentProblem: If the database cannot be read.
    """
    record = read_record(find_study(name_or_folder, storage))
    tracking, base = TrackingConfig(**record.tracking), record.folder.parent
    if tracking.uri is None:
        uri, artifacts = default_tracking_uri(base), artifacts_folder(base)
    elif tracking.uri.startswith(("http://", "https://")):
        return tracking.uri, None
    else:
        uri, artifacts = tracking.uri, None
    with as_problem("MLflow's database cannot be read"):
        return uri, runs_page(uri, tracking.experiment, record.study_id, artifacts)


@files_as_problem()
def sync_study(name_or_folder: str, storage: str, *, everything: bool = False) -> int:
    """Send MLflow the events that it has not received; return their number.

    Args:
        name_or_folder: Name of the study under the storage, or its folder.
        storage: Folder of the studies.
        everything: Send all events again, and restore what was deleted in MLflow.

    Raises:
        EnvironmentProblem: If MLflow cannot be reached, or lines of the spool are damaged: the
            others are sent.
    """
    record = read_record(find_study(name_or_folder, storage))
    recorder = build_recorder(
        TrackingConfig(**record.tracking),
        record.folder.parent,
        record.study_id,
        restores=everything,
    )
    spool = Spool(record.folder / SPOOL_NAME)
    if everything:
        spool.rewind()
    damaged = spool.damaged()
    with as_problem("MLflow did not take the events"):
        num_sent = send_events(spool, recorder)
    with as_problem(f"{num_sent} events sent, but MLflow did not take the files"):
        num_sent += send_files(spool, recorder)
    if damaged:
        raise EnvironmentProblem(
            f"{num_sent} events sent; damaged, and therefore not sent: {', '.join(damaged)}; "
            "remove these lines, or bring the file back from a backup"
        )
    return num_sent


@contextmanager
def as_problem(what: str) -> Iterator[None]:
    """Turn whatever a server or its client raises into one message."""
    try:
        yield
    except DrtuneError:
        raise
    except Exception as error:
        raise EnvironmentProblem(f"{what}: {error}") from error
