"""The report of a study: written at its end, and on demand while it runs and afterwards."""

from __future__ import annotations

import logging
from pathlib import Path

from drtune_ray.config.study import STUDY
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.folders import atomic_write, files_as_problem
from drtune_ray.results.report.page import report_page
from drtune_ray.storage.record import (
    REPORT_NAME,
    SPOOL_NAME,
    Record,
    find_study,
    read_record,
)
from drtune_ray.study.report_content import gather
from drtune_ray.study.status import DONE, FAILED, NOT_SEEN, RUNNING, read_status
from drtune_ray.study.sync import sync_study
from drtune_ray.tracking.events import FilesReady
from drtune_ray.tracking.spool import Spool

logger = logging.getLogger(__name__)
ARTIFACT = "report"


@files_as_problem()
def report_study(
    name_or_folder: str, storage: str, *, output: Path | None = None, with_images: bool = True
) -> Path:
    """Write the report of a study and return its path; MLflow receives it too.

    While another process drives the study, or may do so on another machine, the report is only
    written: the driver sends its own at the end.

    Args:
        name_or_folder: Name of the study under the storage, or its folder.
        storage: Folder of the studies.
        output: File to write instead of ``report.html`` in the study's folder; MLflow then
            receives nothing.
        with_images: Whether to include pictures of misclassified images.

    Raises:
        ConfigError: If there is no such study.
        EnvironmentProblem: If its database does not answer, or the file cannot be written.
    """
    record = read_record(find_study(name_or_folder, storage))
    if record.kind != STUDY:
        raise ConfigError(
            f"{record.folder} is a training of one configuration, which has no search to report: "
            "give a study, or open its run with `drtune-ray ui`"
        )
    status = read_status(str(record.folder), storage)
    path = output or record.folder / REPORT_NAME
    write_report(record, path, state=status.state, with_images=with_images)
    if output is None and status.state not in (RUNNING, NOT_SEEN):
        _send(record, path, storage)
    return path


def write_report(record: Record, path: Path, *, state: str, with_images: bool = True) -> None:
    """Write the report of a study; nothing else is changed.

    Args:
        record: The study.
        path: The file.
        state: State of the study, as `Status.state`.
        with_images: Whether to include pictures of misclassified images.
    """
    page = report_page(gather(record, state=state, with_images=with_images))
    atomic_write(path, lambda temporary: temporary.write_text(page, "utf-8"), is_durable=False)


def write_final_report(folder: Path, *, has_winner: bool = True) -> bool:
    """Write the report of a study that ends; return whether it could be written.

    Args:
        folder: Folder of the study.
        has_winner: Whether a trial completed.
    """
    state = DONE if has_winner else FAILED
    try:
        with files_as_problem():
            write_report(read_record(folder), folder / REPORT_NAME, state=state)
    except EnvironmentProblem as problem:
        logger.warning(
            "the report could not be written: %s; `drtune-ray report` tries again", problem
        )
        return False
    except Exception:  # whatever it is, the study's result stands without it
        logger.warning(
            "the report could not be written: `drtune-ray report` tries again", exc_info=True
        )
        return False
    return True


def _send(record: Record, path: Path, storage: str) -> None:
    """Send the report to MLflow; a server that is away does not hide it."""
    Spool(record.folder / SPOOL_NAME).append(FilesReady(None, str(path), ARTIFACT))
    try:
        sync_study(str(record.folder), storage)
    except EnvironmentProblem as error:
        logger.warning("%s; `drtune-ray sync` sends the report later", error)
