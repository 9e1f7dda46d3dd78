"""Outputs of a command: for people, live or line by line; for programs; or quiet."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from typing import Any, TextIO

import click
from rich.console import Console

from drtune_ray.config.metric import METRICS
from drtune_ray.display.live_table import LiveTable
from drtune_ray.display.progress import INTERRUPTED, StudyProgress, TrialRow
from drtune_ray.display.text import figure, percent, wrapped
from drtune_ray.errors import DrtuneError
from drtune_ray.execution.environment import JOB_CONFIG
from drtune_ray.tracking.events import (
    Event,
    MetricsRecorded,
    RunFinished,
    StepsRecorded,
    now_ms,
    to_plain,
)

SUMMARY_SECONDS = 60.0
NUM_NAMED = 8
LOSSES = ("loss", "cross_entropy", "distribution_regularization")
INTERRUPTED_CODE = 130
STOPPING = (
    "Stopping: running trials write a checkpoint, which takes a few seconds. Ctrl-C again stops at "
    "once and loses the training since their last checkpoint."
)


class Quiet:
    """Prints only warnings, on stderr; base class of the other outputs."""

    def __init__(self) -> None:
        self._is_stopping = False

    def say(self, text: str) -> None:
        """Print a sentence about the plan or the result."""

    def plan(self, progress: StudyProgress, facts: Mapping[str, Any]) -> None:
        """Announce that the trials are about to start.

        Args:
            progress: Progress of the study; the output updates it with each event.
            facts: The plan, for programs.
        """

    def take(self, event: Event) -> None:
        """Receive an event."""
        is_end = isinstance(event, RunFinished) and event.state == INTERRUPTED
        if is_end and not self._is_stopping:
            self._is_stopping = True
            self.warn(STOPPING)

    def notice(self, text: str) -> None:
        """Print a line for the user while trials run or wait."""
        self.warn(text)

    def warn(self, text: str) -> None:
        """Print a line in every mode."""
        click.echo(text, err=True)

    def close(self) -> None:
        """End the output after the trials, whatever their outcome."""


class People(Quiet):
    """Shows a live table on a terminal; elsewhere a line per trial and a regular summary.

    Args:
        console: Console to write to.
        is_live: Whether the console can be redrawn.
        clock: Returns seconds.
    """

    def __init__(
        self, console: Console, *, is_live: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._console, self._is_live, self._clock = console, is_live, clock
        self._progress: StudyProgress | None = None
        self._table: LiveTable | None = None
        self._summarized = 0.0

    def say(self, text: str) -> None:
        """Print a sentence."""
        text = wrapped(text, self._console.file)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    notice = say

    def warn(self, text: str) -> None:
        """Print a line, above the table if there is one."""
        if self._table is not None:
            self.say(text)
        else:
            super().warn(text)

    def plan(self, progress: StudyProgress, facts: Mapping[str, Any]) -> None:
        """Start to show the progress."""
        self.close()  # the table of an earlier part of the study
        self._progress, self._summarized = progress, self._clock()
        if self._is_live:
            self._table = LiveTable(self._console, progress, take_stderr=sys.stderr.isatty())
            self._table.start()

    def take(self, event: Event) -> None:
        """Show an event."""
        super().take(event)
        if isinstance(event.number, str):
            self._take_of_refit(event.number, event)
            return
        row = self._progress.take(event) if self._progress else None
        if self._progress is None or row is None or self._table is not None:
            return
        if isinstance(event, RunFinished):
            self._print(_end_line(self._progress, row))
        elif isinstance(event, MetricsRecorded):
            if self._clock() - self._summarized >= SUMMARY_SECONDS:
                self._print(_summary_line(self._progress))

    def _take_of_refit(self, name: str, event: Event) -> None:
        """Print a line per epoch of a training after the search, below the table of the trials."""
        self.close()
        if isinstance(event, MetricsRecorded):
            kind = name.rpartition("-")[0].replace("-", " ")  # "final-fit-00003"
            self.say(f"  {kind}, epoch {event.step}  {epoch_text(event.metrics)}")

    def close(self) -> None:
        """Stop redrawing the table."""
        if self._table is not None:
            self._table.stop()
            self._table = None

    def _print(self, text: str) -> None:
        self.say(text)
        self._summarized = self._clock()


class TrainingLines(Quiet):
    """Prints a line per epoch of a single training, for people.

    A resumed training sends the epochs of earlier runs again; they are not printed.

    Args:
        num_epochs: Number of epochs of the training.
    """

    def __init__(self, num_epochs: int) -> None:
        super().__init__()
        self._num_epochs, self._started_ms = num_epochs, now_ms()

    def say(self, text: str) -> None:
        """Print a sentence."""
        click.echo(text)

    notice = say

    def take(self, event: Event) -> None:
        """Print the metrics at the end of an epoch."""
        super().take(event)
        if not isinstance(event, MetricsRecorded) or event.time_ms < self._started_ms:
            return
        self.say(f"epoch {event.step}/{self._num_epochs}  {epoch_text(event.metrics)}")


def epoch_text(metrics: Mapping[str, float]) -> str:
    """Format losses, validation accuracy if measured, and duration of an epoch."""
    parts = [f"{key} {metrics[key]:.4f}" for key in LOSSES if key in metrics]
    if "val_accuracy" in metrics:
        parts.append(f"validation {percent(metrics['val_accuracy'])}")
        best = [m for m in METRICS.values() if m.best in metrics and m.measure != "val_accuracy"]
        parts += [f"{m.measure.removeprefix('val_')} {figure(m, metrics[m.measure])}" for m in best]
    return "  ".join([*parts, f"{metrics['seconds']:.1f} s"])


class JsonLines(Quiet):
    """Writes one line of JSON per event; docs/json.md describes the schema.

    Args:
        stream: Stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def say(self, text: str) -> None:
        """Write a sentence as a notice."""
        self.notice(text)

    def notice(self, text: str) -> None:
        """Write a line for people as an object."""
        write_json(self._stream, "notice", {"text": text})

    def plan(self, progress: StudyProgress, facts: Mapping[str, Any]) -> None:
        """Write the facts."""
        write_json(self._stream, "study_planned", facts)

    def take(self, event: Event) -> None:
        """Write an event, except the metrics of single steps."""
        super().take(event)
        if not isinstance(event, StepsRecorded):
            values = to_plain(event)
            write_json(self._stream, values.pop("kind"), values, values.pop("time_ms", None))


@contextmanager
def json_stdout(*, is_wanted: bool) -> Iterator[TextIO]:
    """Reserve stdout for JSON, with an error as its last line; other output goes to stderr.

    Args:
        is_wanted: False leaves stdout as it is.
    """
    stream = sys.stdout
    if not is_wanted:
        yield stream
        return
    with redirect_stdout(sys.stderr):
        try:
            yield stream
        except KeyboardInterrupt:
            reason = "interrupted: repeat the command to resume"
            write_json(stream, "result", {"exit_code": INTERRUPTED_CODE, "reason": reason})
            raise
        except DrtuneError as error:
            facts = {"exit_code": error.exit_code, "reason": str(error)}
            write_json(stream, "result", facts)
            raise


def is_live(console: Console, environment: Mapping[str, str]) -> bool:
    """Return whether a console can be redrawn: a terminal, and not the log of a Ray job."""
    is_screen = console.is_terminal and not console.is_dumb_terminal
    return is_screen and JOB_CONFIG not in environment


def write_json(
    stream: TextIO, kind: str, values: Mapping[str, Any], time_ms: int | None = None
) -> None:
    """Write an object with its kind and time.

    Args:
        stream: Stream to write to.
        kind: Kind of the object.
        values: Its other values.
        time_ms: Milliseconds since 1970; None means now.
    """
    seconds = time.time() if time_ms is None else time_ms / 1000
    stamp = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    line = {"kind": kind, "time": stamp.replace("+00:00", "Z"), **values}
    stream.write(json.dumps(line, default=str) + "\n")
    stream.flush()


def _end_line(progress: StudyProgress, row: TrialRow) -> str:
    return (
        f"[{progress.num_done}/{progress.num_trials}] trial {row.label}: best validation accuracy "
        f"{percent(row.best)} after {row.epoch} epochs, {row.outcome}; {_summary(progress)}"
    )


def _summary_line(progress: StudyProgress) -> str:
    running = progress.running
    named = [f"{r.label} (epoch {r.epoch}, best {percent(r.best)})" for r in running[:NUM_NAMED]]
    if len(running) > NUM_NAMED:
        named.append(f"{len(running) - NUM_NAMED} more")
    return (
        f"[{progress.num_done}/{progress.num_trials}] running: {', '.join(named)}; "
        f"{_summary(progress)}"
    )


def _summary(progress: StudyProgress) -> str:
    return "; ".join(progress.summary())
