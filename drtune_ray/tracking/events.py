"""What happens in a study, as plain records that any observer can take.

A run is the study (or a single training) itself, `number` None, or one of its trials; the final
fit of a study is neither and has a name in place of a number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

logger = logging.getLogger(__name__)

Plain = dict[str, Any]
RunKey = int | str | None


@dataclass(frozen=True)
class RunStarted:
    """A run begins, or goes on after an interruption; `time_ms` since 1970."""

    kind: ClassVar[str] = "run_started"
    number: RunKey
    name: str
    params: Plain
    tags: dict[str, str]
    time_ms: int = field(default_factory=lambda: now_ms())


@dataclass(frozen=True)
class MetricsRecorded:
    """Numbers of one epoch of a run."""

    kind: ClassVar[str] = "metrics_recorded"
    number: RunKey
    step: int
    metrics: dict[str, float]
    time_ms: int = field(default_factory=lambda: now_ms())


@dataclass(frozen=True)
class StepsRecorded:
    """Numbers of consecutive training steps of a run."""

    kind: ClassVar[str] = "steps_recorded"
    number: RunKey
    first_step: int
    steps: list[dict[str, float]]
    time_ms: int


@dataclass(frozen=True)
class RunFinished:
    """A run has ended: COMPLETE, PRUNED, FAIL, or INTERRUPTED where it can be resumed."""

    kind: ClassVar[str] = "run_finished"
    number: RunKey
    state: str
    outcome: str
    metrics: dict[str, float]
    tags: dict[str, str]
    time_ms: int = field(default_factory=lambda: now_ms())


@dataclass(frozen=True)
class FilesReady:
    """Files that belong to a run, to be copied to `artifact_path`."""

    kind: ClassVar[str] = "files_ready"
    number: RunKey
    path: str
    artifact_path: str


Event = RunStarted | MetricsRecorded | StepsRecorded | RunFinished | FilesReady
Sink = Callable[[Event], None]
_KINDS: dict[str, Any] = {
    event.kind: event
    for event in (RunStarted, MetricsRecorded, StepsRecorded, RunFinished, FilesReady)
}


def fan_out(*sinks: Sink | None) -> Sink:
    """Every observer gets every event; one that fails does not stop the run."""

    def emit(event: Event) -> None:
        for sink in sinks:
            if sink is None:
                continue
            try:
                sink(event)
            except Exception:  # observers never steer a run
                logger.warning("an observer failed on %s", event.kind, exc_info=True)

    return emit


def to_plain(event: Event) -> Plain:
    """An event as JSON can hold it."""
    return {"kind": event.kind} | asdict(event)


def from_plain(values: Plain) -> Event:
    """The counterpart of :func:`to_plain`."""
    rest = dict(values)
    event: Event = _KINDS[rest.pop("kind")](**rest)
    return event


def now_ms() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)
