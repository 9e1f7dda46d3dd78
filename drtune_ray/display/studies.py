"""The studies of a storage and what may be deleted of one, as text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from drtune_ray.display.text import Command, figure, size
from drtune_ray.study.cleaning import Removable
from drtune_ray.study.status import Status

HEADER = ("name", "kind", "state", "trials", "best", "last activity", "size")
KEPT = "Kept: record, trials' values, tables, events for MLflow, the winner and its candidates"


def studies_lines(found: Sequence[Status]) -> Iterator[str]:
    """Yield a table of studies and trainings, the latest first."""
    latest = sorted(found, key=lambda status: -status.last_sign)
    rows = [HEADER, *map(_row, latest)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _row(status: Status) -> tuple[str, ...]:
    best = figure(status.best.metric, status.best.best_value) if status.best else "-"
    return (
        status.folder.name,
        status.kind,
        status.state,
        f"{status.num_done}/{status.num_trials}",
        best,
        _moment(status.last_sign),
        size(status.num_bytes),
    )


def _moment(seconds: float) -> str:
    if not seconds:
        return "-"
    present = datetime.fromtimestamp(time.time()).date()
    moment = datetime.fromtimestamp(seconds)
    return moment.strftime("%H:%M" if moment.date() == present else "%Y-%m-%d %H:%M")


def cleaning_lines(
    folder: Path, found: Sequence[Removable], program: str, *, is_deleted: bool, cache: bool
) -> Iterator[str]:
    """Yield what may be deleted of a study, or was.

    Args:
        folder: Folder of the study.
        found: What may be deleted.
        program: Command line name of this program.
        is_deleted: Whether it was deleted.
        cache: Whether the prepared tables of the storage are included.
    """
    total = size(sum(each.num_bytes for each in found))
    for each in found:
        yield f"  {size(each.num_bytes):>10}  {each.what}"
    yield KEPT
    if is_deleted:
        yield f"{total} deleted."
    elif found:
        option = " --cache" if cache else ""
        yield f"Nothing was deleted. To delete {total}:"
        yield Command(f"  {program} clean {folder} --yes{option}")
    else:
        yield "Nothing can be deleted."
