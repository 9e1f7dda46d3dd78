"""Events of a study, as plain records for any observer.

A run is the study (or a single training) itself, with `number` None, or one of its trials. The
final fit of a study is neither and has a name instead of a number.
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
    """A run starts, or resumes after an interruption.

    Attributes:
        number: The run.
        name: Its name for people.
        params: Settings that it uses, by dotted path; they never change.
        tags: Further facts, which may change.
        time_ms: Time in milliseconds since 1970.
        dataset: The study's images: `name`, `digest`, `source` and `profile`; empty for a trial,
            which has those of its study.
        searched: Paths of the settings that a study searches; empty for a trial.
        unused: Paths of the params that the run ignores, and that are not recorded in MLflow.
        resolved: Numbers that named values of params stand for, by path.
    """

    kind: ClassVar[str] = "run_started"
    number: RunKey
    name: str
    params: Plain
    tags: dict[str, str]
    time_ms: int = field(default_factory=lambda: now_ms())
    dataset: dict[str, str] = field(default_factory=dict)
    searched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    resolved: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricsRecorded:
    """Metrics of one epoch of a run."""

    kind: ClassVar[str] = "metrics_recorded"
    number: RunKey
    step: int
    metrics: dict[str, float]
    time_ms: int = field(default_factory=lambda: now_ms())


@dataclass(frozen=True)
class StepsRecorded:
    """Metrics of consecutive training steps of a run."""

    kind: ClassVar[str] = "steps_recorded"
    number: RunKey
    first_step: int
    steps: list[dict[str, float]]
    time_ms: int


@dataclass(frozen=True)
class RunFinished:
    """A run ends: COMPLETE, PRUNED, FAIL, or INTERRUPTED if it can be resumed."""

    kind: ClassVar[str] = "run_finished"
    number: RunKey
    state: str
    outcome: str
    metrics: dict[str, float]
    tags: dict[str, str]
    time_ms: int = field(default_factory=lambda: now_ms())


@dataclass(frozen=True)
class FilesReady:
    """Files of a run that are ready to be copied to `artifact_path`."""

    kind: ClassVar[str] = "files_ready"
    number: RunKey
    path: str
    artifact_path: str
    time_ms: int = field(default_factory=lambda: now_ms(), compare=False)


@dataclass(frozen=True)
class ModelReady:
    """A model of a run that is ready to be logged and registered.

    Attributes:
        number: The run.
        path: Folder of the model.
        name: Name to register it under.
        tags: Digest of its weights, and what decides whether it is the champion.
        time_ms: Time in milliseconds since 1970.
    """

    kind: ClassVar[str] = "model_ready"
    number: RunKey
    path: str
    name: str
    tags: dict[str, str]
    time_ms: int = field(default_factory=lambda: now_ms(), compare=False)


Metrics = MetricsRecorded | StepsRecorded
WithFiles = FilesReady | ModelReady
Event = RunStarted | MetricsRecorded | StepsRecorded | RunFinished | WithFiles
Sink = Callable[[Event], None]
_KINDS: dict[str, Any] = {
    event.kind: event
    for event in (RunStarted, MetricsRecorded, StepsRecorded, RunFinished, FilesReady, ModelReady)
}


def fan_out(*sinks: Sink | None) -> Sink:
    """Return a sink that passes every event to every observer; their failures are logged."""

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
    """Convert an event to values that JSON can hold."""
    return {"kind": event.kind} | asdict(event)


def from_plain(values: Plain) -> Event:
    """Convert the values of :func:`to_plain` back to an event; the id of a line is left out."""
    rest = dict(values)
    rest.pop("id", None)
    event: Event = _KINDS[rest.pop("kind")](**rest)
    return event


def now_ms() -> int:
    """Return the present time in milliseconds since 1970."""
    return int(time.time() * 1000)
