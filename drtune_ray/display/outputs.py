"""Where a command's words go: to people, live or line by line; to programs; or nowhere."""

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

from drtune_ray.display.live_table import LiveTable
from drtune_ray.display.progress import INTERRUPTED, StudyProgress, TrialRow
from drtune_ray.display.text import percent
from drtune_ray.errors import DrtuneError
from drtune_ray.execution.environment import JOB_CONFIG
from drtune_ray.tracking.events import Event, MetricsRecorded, RunFinished, StepsRecorded, to_plain

STANDING_SECONDS = 60.0
NUM_NAMED = 8
LOSSES = ("loss", "cross_entropy", "distribution_regularization")
INTERRUPTED_CODE = 130
STOPPING = (
    "Stopping: running trials save what they have, a few seconds. Ctrl-C again does not wait for "
    "them and loses what they trained since their last save."
)


class Quiet:
    """Says nothing but warnings, on stderr; the other outputs say more."""

    def __init__(self) -> None:
        self._is_stopping = False

    def say(self, text: str) -> None:
        """A sentence about what is going to happen."""

    def plan(self, progress: StudyProgress, facts: Mapping[str, Any]) -> None:
        """The trials are about to start.

        Args:
            progress: Of the study; kept up to date by the output.
            facts: The plan, for programs.
        """

    def take(self, event: Event) -> None:
        """Something happened."""
        is_end = isinstance(event, RunFinished) and event.state == INTERRUPTED
        if is_end and not self._is_stopping:
            self._is_stopping = True
            self.warn(STOPPING)

    def notice(self, text: str) -> None:
        """A line for the user while trials run or wait."""
        self.warn(text)

    def warn(self, text: str) -> None:
        """A line that is shown in every mode."""
        click.echo(text, err=True)

    def close(self) -> None:
        """The trials have ended, in whatever way."""


class People(Quiet):
    """A live table on a terminal; elsewhere a line a trial and, now and then, how it stands.

    Args:
        console: Where to write.
        is_live: Whether it can be drawn over.
        clock: Seconds.
    """

    def __init__(
        self, console: Console, *, is_live: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._console, self._is_live, self._clock = console, is_live, clock
        self._progress: StudyProgress | None = None
        self._table: LiveTable | None = None
        self._told = 0.0

    def say(self, text: str) -> None:
        """Print it."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    notice = say

    def warn(self, text: str) -> None:
        """Above the table where there is one: elsewhere it would be drawn over."""
        if self._table is not None:
            self.say(text)
        else:
            super().warn(text)

    def plan(self, progress: StudyProgress, facts: Mapping[str, Any]) -> None:
        """From now on, show the progress."""
        self.close()  # of the part of the study before
        self._progress, self._told = progress, self._clock()
        if self._is_live:
            self._table = LiveTable(self._console, progress, take_stderr=sys.stderr.isatty())
            self._table.start()

    def take(self, event: Event) -> None:
        """Show it."""
        super().take(event)
        if isinstance(event.number, str):
            self._take_of_final_fit(event)
            return
        row = self._progress.take(event) if self._progress else None
        if self._progress is None or row is None or self._table is not None:
            return
        if isinstance(event, RunFinished):
            self._tell(_end_line(self._progress, row))
        elif isinstance(event, MetricsRecorded):
            if self._clock() - self._told >= STANDING_SECONDS:
                self._tell(_standing_line(self._progress))

    def _take_of_final_fit(self, event: Event) -> None:
        """A line an epoch, below the table of the trials."""
        self.close()
        if isinstance(event, MetricsRecorded):
            self.say(f"  final fit, epoch {event.step}  {epoch_text(event.metrics)}")

    def close(self) -> None:
        """Leave the table as it is."""
        if self._table is not None:
            self._table.stop()
            self._table = None

    def _tell(self, text: str) -> None:
        self.say(text)
        self._told = self._clock()


class TrainingLines(Quiet):
    """A line an epoch of a single training, for people.

    Args:
        num_epochs: Of the training.
    """

    def __init__(self, num_epochs: int) -> None:
        super().__init__()
        self._num_epochs = num_epochs

    def say(self, text: str) -> None:
        """Print it."""
        click.echo(text)

    notice = say

    def take(self, event: Event) -> None:
        """Print an epoch's end."""
        super().take(event)
        if not isinstance(event, MetricsRecorded):
            return
        self.say(f"epoch {event.step}/{self._num_epochs}  {epoch_text(event.metrics)}")


def epoch_text(metrics: Mapping[str, float]) -> str:
    """Losses, validation accuracy where there is one, and seconds of an epoch."""
    parts = [f"{key} {metrics[key]:.4f}" for key in LOSSES if key in metrics]
    if "val_accuracy" in metrics:
        parts.append(f"validation {percent(metrics['val_accuracy'])}")
    return "  ".join([*parts, f"{metrics['seconds']:.1f} s"])


class JsonLines(Quiet):
    """One JSON object a line for each event; docs/json.md is their schema.

    Args:
        stream: Where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def say(self, text: str) -> None:
        """As a notice."""
        self.notice(text)

    def notice(self, text: str) -> None:
        """A line for people, as an object."""
        write_json(self._stream, "notice", {"text": text})

    def plan(self, progress: StudyProgress, facts: Mapping[str, Any]) -> None:
        """The facts."""
        write_json(self._stream, "study_planned", facts)

    def take(self, event: Event) -> None:
        """The event, but for the numbers of single steps."""
        super().take(event)
        if not isinstance(event, StepsRecorded):
            values = to_plain(event)
            write_json(self._stream, values.pop("kind"), values, values.pop("time_ms", None))


@contextmanager
def json_stdout(*, is_wanted: bool) -> Iterator[TextIO]:
    """Stdout for JSON alone, with an error as its last line too; all else goes to stderr.

    Args:
        is_wanted: False: stdout stays as it is.
    """
    stream = sys.stdout
    if not is_wanted:
        yield stream
        return
    with redirect_stdout(sys.stderr):
        try:
            yield stream
        except KeyboardInterrupt:
            reason = "interrupted: the same command goes on"
            write_json(stream, "result", {"exit_code": INTERRUPTED_CODE, "reason": reason})
            raise
        except DrtuneError as error:
            facts = {"exit_code": error.exit_code, "reason": str(error)}
            write_json(stream, "result", facts)
            raise


def is_live(console: Console, environment: Mapping[str, str]) -> bool:
    """Whether a console can be drawn over: a terminal, and not the log of a Ray job."""
    is_screen = console.is_terminal and not console.is_dumb_terminal
    return is_screen and JOB_CONFIG not in environment


def write_json(
    stream: TextIO, kind: str, values: Mapping[str, Any], time_ms: int | None = None
) -> None:
    """Write an object that says what it is and when it was.

    Args:
        stream: Where to.
        kind: What it is.
        values: The rest.
        time_ms: Milliseconds since 1970; None: now.
    """
    seconds = time.time() if time_ms is None else time_ms / 1000
    stamp = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    line = {"kind": kind, "time": stamp.replace("+00:00", "Z"), **values}
    stream.write(json.dumps(line, default=str) + "\n")
    stream.flush()


def _end_line(progress: StudyProgress, row: TrialRow) -> str:
    return (
        f"[{progress.num_done}/{progress.num_trials}] trial {row.label}: best validation accuracy "
        f"{percent(row.best)} after {row.epoch} epochs, {row.outcome}; {_standing(progress)}"
    )


def _standing_line(progress: StudyProgress) -> str:
    running = progress.running
    named = [f"{r.label} (epoch {r.epoch}, best {percent(r.best)})" for r in running[:NUM_NAMED]]
    if len(running) > NUM_NAMED:
        named.append(f"{len(running) - NUM_NAMED} more")
    return (
        f"[{progress.num_done}/{progress.num_trials}] running: {', '.join(named)}; "
        f"{_standing(progress)}"
    )


def _standing(progress: StudyProgress) -> str:
    return "; ".join(progress.standing())
