"""Reports of a trial while it trains."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from drtune_ray.training.checkpoint import TrialFolder

COMPLETED, PATIENCE, DIVERGED = "completed", "stopped by patience", "diverged"
CONFIG_NUMBER = "number"
CONFIG_TRIAL = "trial"
OBJECTIVE = "best_value"  # of a result, whatever the metric
EPOCH = "epoch"
OUTCOME = "outcome"
HISTORY = "history"
NUM_THREADS = "num_threads"
OUT_OF_MEMORY = "out of memory"
ONE_IMAGE = "a batch of one image"
# Outcomes that the settings cause, wherever the trial runs.
OF_SETTINGS = (DIVERGED, OUT_OF_MEMORY, ONE_IMAGE)


@dataclass(frozen=True)
class EpochRecord:
    """One completed epoch; kept in the checkpoint, so that no report is lost.

    Attributes:
        epoch: Number of the epoch, from 1.
        time_ms: Time of its end, in milliseconds since 1970.
        metrics: Metrics by name, all finite.
        steps: Loss and its parts by name for each training step, over all processes.
    """

    epoch: int
    time_ms: int
    metrics: dict[str, float]
    steps: list[dict[str, float]]


@dataclass(frozen=True)
class EpochReport:
    """The end of an epoch, or of the trial.

    Attributes:
        record: The epoch; None if the trial diverged before its first epoch ended.
        history: All epochs so far, this one included.
        best_value: Best value so far of `training.metric`; None without validation images.
        outcome: `COMPLETED`, `PATIENCE` or `DIVERGED` at the end of the trial; None before.
        save: Function that writes the weights after a best epoch, and the checkpoint: at the end
            of the trial at once, otherwise while the next epoch trains, so that a trial that is
            stopped here never writes it. All processes call it.
        settle: Function that writes the checkpoint that `save` left for later and waits until it
            is on disk; all processes call it.
    """

    record: EpochRecord | None
    history: tuple[EpochRecord, ...]
    best_value: float | None
    outcome: str | None
    save: Callable[[TrialFolder], None]
    settle: Callable[[], None]


@dataclass(frozen=True)
class SavePoint:
    """A step within an epoch at which a checkpoint is due.

    All processes call `save`, which returns when it is on disk, so that `settle` has nothing to do.
    """

    epoch: int
    step: int
    save: Callable[[TrialFolder], None]
    settle: Callable[[], None]


def trial_result(report: EpochReport, num_threads: int) -> dict[str, Any]:
    """Convert the report of an epoch to a result of Tune.

    It holds the whole history, so that the next report replaces one that a killed driver missed.
    """
    record = report.record
    return {
        OBJECTIVE: math.nan if report.best_value is None else report.best_value,
        EPOCH: record.epoch if record else 0,
        OUTCOME: report.outcome or "",
        HISTORY: json.dumps([_without_steps(entry) for entry in report.history]),
        NUM_THREADS: num_threads,
        "done": report.outcome is not None,
    }


def outcome_of_settings(error: Exception) -> str | None:
    """Return the outcome of an error that the settings cause, None for errors of the machine."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    # BatchNorm's check of its batch, which has no class of its own (PyTorch 2.9).
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return ONE_IMAGE
    return None


def failed_by_point(outcome: str, last: dict[str, Any] | None) -> dict[str, Any]:
    """Return the last result of a trial whose configuration made it impossible to continue."""
    empty = {OBJECTIVE: math.nan, EPOCH: 0, HISTORY: "[]", NUM_THREADS: 0}
    return (last or empty) | {OUTCOME: outcome, "done": True}


def result_history(result: dict[str, Any]) -> list[EpochRecord]:
    """Return the epochs that a result holds."""
    return [EpochRecord(**entry) for entry in json.loads(result.get(HISTORY) or "[]")]


def _without_steps(record: EpochRecord) -> dict[str, Any]:
    return asdict(record) | {"steps": []}
