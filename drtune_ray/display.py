"""What a person sees while a study or training runs, and at its end."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from drtune_ray.tracking.events import Event, MetricsRecorded, RunFinished, RunStarted

REFRESHES_PER_SECOND = 2
NUM_ROWS_SHOWN = 14
STATE_STYLES = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "running": "cyan"}


@dataclass
class _Row:
    name: str
    settings: str
    started: float
    state: str = "running"
    outcome: str = ""
    epoch: int = 0
    accuracy: float | None = None
    best: float | None = None


class StudyDisplay:
    """A live table with a progress bar on a terminal; one line a trial elsewhere.

    Args:
        console: Where to write.
        num_trials: Of the whole study.
        num_done: Trials that earlier runs finished.
        num_epochs: Of a trial that is not stopped early.
        searched: Paths whose values are shown.
    """

    def __init__(
        self,
        console: Console,
        num_trials: int,
        num_done: int,
        num_epochs: int,
        searched: tuple[str, ...],
    ) -> None:
        self._console, self._num_epochs, self._searched = console, num_epochs, searched
        self._num_trials, self._num_before = num_trials, num_done
        self._rows: dict[int, _Row] = {}
        self._finished: set[int] = set()
        self._started = time.monotonic()
        self._bar = Progress(
            TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[s]}")
        )
        self._task = self._bar.add_task("", total=num_trials, completed=num_done, s="")
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=False,
        )

    def __enter__(self) -> StudyDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take an event of the study."""
        if isinstance(event, RunStarted) and event.number is not None:
            self._start(event.number, event)
        elif isinstance(event, MetricsRecorded) and event.number in self._rows:
            self._epoch(self._rows[event.number], event)
        elif isinstance(event, RunFinished) and event.number in self._rows:
            self._finish(event.number, event)

    def notice(self, text: str) -> None:
        """A line that stays, above the table."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _start(self, number: int, event: RunStarted) -> None:
        values = [
            f"{path.rsplit('.', 1)[-1]}={_short(event.params[path])}"
            for path in self._searched
            if path in event.params
        ]
        if event.params.get("method.name") == "ce_tuning":
            values = values[-1:]
        self._rows[number] = _Row(event.name, " ".join(values), time.monotonic())

    def _epoch(self, row: _Row, event: MetricsRecorded) -> None:
        row.epoch = event.step
        row.accuracy = event.metrics["val_accuracy"]
        row.best = event.metrics["best_val_accuracy"]

    def _finish(self, number: int, event: RunFinished) -> None:
        row = self._rows[number]
        row.state, row.outcome = event.state, event.outcome
        if event.state != "INTERRUPTED":
            self._finished.add(number)
        if not self._console.is_terminal:
            done = self._num_before + len(self._finished)
            self._console.print(
                f"[{done}/{self._num_trials}] {row.name}: best validation accuracy "
                f"{percent(row.best)} after {row.epoch} epochs, {row.outcome}; "
                f"best so far {self._best_so_far()}; {self._time_left()}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _render(self) -> RenderableType:
        table = Table(expand=True, pad_edge=False, box=None)
        for heading in ("trial", "state", "epoch", "val. acc.", "best"):
            table.add_column(heading, no_wrap=True)
        # The settings take what is left; the figures are never cut.
        table.add_column("settings", overflow="ellipsis", no_wrap=True, ratio=1)
        for row in list(self._rows.values())[-NUM_ROWS_SHOWN:]:
            style = STATE_STYLES.get(row.state, "")
            table.add_row(
                row.name,
                Text(row.state.lower(), style),
                f"{row.epoch}/{self._num_epochs}",
                percent(row.accuracy),
                percent(row.best),
                Text(row.settings),
            )
        done = self._num_before + len(self._finished)
        status = f"best so far {self._best_so_far()}; {self._time_left()}"
        self._bar.update(self._task, completed=done, s=status)
        return Group(table, self._bar)

    def _best_so_far(self) -> str:
        rows = [row for row in list(self._rows.values()) if row.best is not None]
        if not rows:
            return "-"
        best = max(rows, key=lambda row: row.best or 0.0)
        return f"{percent(best.best)} ({best.name})"

    def _time_left(self) -> str:
        """From the speed so far; trials under way count by their share of epochs."""
        under_way = sum(
            row.epoch / self._num_epochs
            for number, row in list(self._rows.items())  # drawn by a thread of its own
            if number not in self._finished
        )
        worked = len(self._finished) + under_way
        left = self._num_trials - self._num_before - worked
        if worked < 0.5:
            return "time left: not known yet"
        return f"about {duration((time.monotonic() - self._started) / worked * left)} left"


def percent(share: float | None) -> str:
    """0.8632 to "86.32 %"."""
    return "-" if share is None else f"{share:.2%}".replace("%", " %")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest that are not zero."""
    minutes, seconds_left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds_left} s" if minutes else f"{seconds_left} s"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
