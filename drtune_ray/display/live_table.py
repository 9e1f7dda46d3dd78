"""The live table of a terminal; it never truncates figures, whatever the width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from drtune_ray.display.progress import StudyProgress, TrialRow
from drtune_ray.display.text import figure, folded, packed, short

REFRESHES_PER_SECOND = 2
MAX_ROWS, MIN_ROWS = 14, 3
NUM_OTHER_LINES = 8  # headings, bar, summary, and the prompt above
GAP = 2
NAME_WIDTH = 10  # characters per line of a setting's name
BAR_WIDTH = 40
STATE_STYLES = {"complete": "green", "pruned": "yellow", "fail": "red", "running": "cyan"}


@dataclass(frozen=True)
class Column:
    """A column that is shown whole or not at all.

    Attributes:
        heading: Lines of the heading.
        cells: Text of each row.
        rank: Priority; columns of a lower rank are shown first if the width is short.
        is_figure: Whether the cells are aligned to the right.
    """

    heading: tuple[str, ...]
    cells: tuple[str, ...]
    rank: int
    is_figure: bool = True

    @property
    def width(self) -> int:
        """Width in characters."""
        return max(len(text) for text in (*self.heading, *self.cells))


class LiveTable:
    """Draws a study's progress repeatedly until it is stopped.

    Args:
        console: A terminal.
        progress: The progress to draw.
        take_stderr: Whether to print stderr above the table, because it is the same terminal.
    """

    def __init__(self, console: Console, progress: StudyProgress, *, take_stderr: bool) -> None:
        self._live = Live(
            get_renderable=lambda: rendered(progress, console.width, console.height),
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            redirect_stderr=take_stderr,
        )

    def start(self) -> None:
        """Start drawing."""
        self._live.start()

    def stop(self) -> None:
        """Stop drawing and leave the last state on the screen."""
        self._live.stop()


def rendered(progress: StudyProgress, width: int, height: int) -> RenderableType:
    """Render table, progress bar and summary for a terminal of this width and height."""
    rows = progress.shown(max(MIN_ROWS, min(MAX_ROWS, height - NUM_OTHER_LINES)))
    columns = table_columns(progress, rows)
    chosen = fitting(columns, width)
    summary = progress.summary()
    if num_hidden := len(columns) - len(chosen):
        columns_hidden = "1 column" if num_hidden == 1 else f"{num_hidden} columns"
        summary.append(f"{columns_hidden} hidden: widen the terminal")
    lines = packed(summary, width)
    return Group(_table(chosen), _bar(progress, width), Text("\n".join(lines), no_wrap=True))


def table_columns(progress: StudyProgress, rows: Sequence[TrialRow]) -> list[Column]:
    """Return all columns from left to right."""
    epochs = tuple(f"{row.epoch}/{progress.num_epochs}" for row in rows)
    measures = {row.metric.measure.removeprefix("val_") for row in rows}  # one in a study
    name = measures.pop().replace("_", " ") if len(measures) == 1 else "value"
    columns = [
        Column(("trial",), tuple(row.label for row in rows), 0, is_figure=False),
        Column(("state",), tuple(row.state.lower() for row in rows), 2, is_figure=False),
        Column(("epoch",), epochs, 1),
        Column((name,), tuple(figure(row.metric, row.value) for row in rows), 3),
        Column(("best",), tuple(figure(row.metric, row.best) for row in rows), 0),
    ]
    for rank, (path, name) in enumerate(progress.distinguishing(rows).items(), 4):
        cells = tuple(short(row.setting(path)) for row in rows)
        columns.append(Column(tuple(folded(name, NAME_WIDTH)), cells, rank))
    return columns


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that fit the width, choosing by rank."""
    chosen, left = [], width + GAP
    for column in sorted(columns, key=lambda column: column.rank):
        if column.width + GAP <= left:
            chosen.append(column)
            left -= column.width + GAP
    return [column for column in columns if column in chosen]


def _table(columns: Sequence[Column]) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    height = max((len(column.heading) for column in columns), default=0)
    for column in columns:
        table.add_column(
            # Headings are aligned at the bottom.
            "\n".join(("",) * (height - len(column.heading)) + column.heading),
            justify="right" if column.is_figure else "left",
            width=column.width,
            no_wrap=True,
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(cell, STATE_STYLES.get(cell, "")) for cell in cells))
    return table


def _bar(progress: StudyProgress, width: int) -> Table:
    done, total = progress.num_done, progress.num_trials
    count = f"{done}/{total} trials"
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_row(
        ProgressBar(total, done, width=max(4, min(BAR_WIDTH, width - len(count) - 1))),
        Text(count, no_wrap=True),
    )
    return line
