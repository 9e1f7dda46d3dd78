"""What a trial says of itself while it trains."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from drtune_ray.training.checkpoint import TrialFolder

COMPLETED, PATIENCE, DIVERGED = "completed", "stopped by patience", "diverged"
CONFIG_NUMBER = "number"
CONFIG_TRIAL = "trial"
OBJECTIVE = "best_val_accuracy"
EPOCH = "epoch"
OUTCOME = "outcome"
HISTORY = "history"
NUM_THREADS = "num_threads"
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class EpochRecord:
    """One epoch that was finished; kept in the checkpoint, so that no report is ever lost.

    Attributes:
        epoch: From 1.
        time_ms: When it ended, milliseconds since 1970.
        metrics: Named numbers, all finite.
        steps: Named numbers of each training step; loss parts are global.
    """

    epoch: int
    time_ms: int
    metrics: dict[str, float]
    steps: list[dict[str, float]]


@dataclass(frozen=True)
class EpochReport:
    """The end of an epoch, or of the trial.

    Attributes:
        record: The epoch; where a trial diverged before its first epoch ended, None.
        history: All epochs so far, this one included.
        outcome: None while the trial goes on; `COMPLETED`, `PATIENCE` or `DIVERGED` at its end.
        save: Writes checkpoint and, after a best epoch, its weights; all processes call it.
    """

    record: EpochRecord | None
    history: tuple[EpochRecord, ...]
    outcome: str | None
    save: Callable[[TrialFolder], None]


@dataclass(frozen=True)
class SavePoint:
    """A step within an epoch at which a checkpoint is due; all processes call `save`."""

    epoch: int
    step: int
    save: Callable[[TrialFolder], None]


def trial_result(report: EpochReport, num_threads: int) -> dict[str, Any]:
    """An epoch's report as Tune carries it.

    The whole history goes along: a report that a killed driver never received is made good by the
    next one.
    """
    record = report.record
    return {
        # Without validation images there is none.
        OBJECTIVE: record.metrics.get(OBJECTIVE, math.nan) if record else math.nan,
        EPOCH: record.epoch if record else 0,
        OUTCOME: report.outcome or "",
        HISTORY: json.dumps([_without_steps(entry) for entry in report.history]),
        NUM_THREADS: num_threads,
        "done": report.outcome is not None,
    }


def failed_by_point(outcome: str, last: dict[str, Any] | None) -> dict[str, Any]:
    """The last result of a trial whose configuration made it impossible to go on."""
    empty = {OBJECTIVE: math.nan, EPOCH: 0, HISTORY: "[]", NUM_THREADS: 0}
    return (last or empty) | {OUTCOME: outcome, "done": True}


def result_history(result: dict[str, Any]) -> list[EpochRecord]:
    """The epochs that a result carries."""
    return [EpochRecord(**entry) for entry in json.loads(result.get(HISTORY) or "[]")]


def _without_steps(record: EpochRecord) -> dict[str, Any]:
    return asdict(record) | {"steps": []}
