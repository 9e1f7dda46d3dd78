"""What a trial says of itself while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from drtune_ray.training.checkpoint import TrialFolder

COMPLETED, PATIENCE, DIVERGED = "completed", "stopped by patience", "diverged"


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
