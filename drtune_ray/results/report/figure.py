"""A figure of the report, as plain values for Plotly's script.

Colours are names such as ``--completed``: the page's style gives them values, for light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from drtune_ray.config.metric import Metric
from drtune_ray.results.report.history import COMPLETED, FAILED, IMPOSSIBLE, STOPPED, UNFINISHED
from drtune_ray.results.report.settings import Axis
from drtune_ray.values import printable

Plain = dict[str, Any]
Cell = str | int | float | None

# Colour, dash and symbol of each kind of end: no two differ by colour alone.
STYLES: dict[str, tuple[str, str, str]] = {
    COMPLETED: ("--completed", "solid", "circle"),
    STOPPED: ("--stopped", "dot", "x-thin-open"),
    IMPOSSIBLE: ("--impossible", "dashdot", "triangle-down"),
    FAILED: ("--failed", "dash", "square"),
    UNFINISHED: ("--unfinished", "longdash", "diamond-open"),
}
WINNER = "--winner"
SCALE = [
    [0.0, "--scale0"],
    [0.25, "--scale1"],
    [0.5, "--scale2"],
    [0.75, "--scale3"],
    [1, "--scale4"],
]
PERCENT = ".1%"
MAX_LABEL = 28
LONG = 300.0  # largest over smallest value from which only powers of ten are marked


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        headers: Names of the columns.
        rows: Cells; numbers are set to the right, None is empty.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        key: Its id in the page.
        title: Its title.
        caption: What it shows, for readers and for screen readers.
        data: Traces of Plotly.
        layout: Layout of Plotly, beyond what all figures share.
        height: Height in pixels.
        min_width: Width in pixels below which it scrolls.
        is_small: Whether several stand side by side.
        table: The same figures as a table.
    """

    key: str
    title: str
    caption: str
    data: Sequence[Plain]
    layout: Plain = field(default_factory=dict)
    height: int = 400
    min_width: int = 0
    is_small: bool = False
    table: Table | None = None


def label(text: object, limit: int = MAX_LABEL) -> str:
    """Return a text as Plotly shows it literally: it takes some HTML in texts.

    A longer one loses its middle, since names that begin alike often differ at their ends.
    """
    plain = printable(str(text))
    if len(plain) <= limit:
        return escape(plain)
    head, tail = -(-(limit - 1) // 2), (limit - 1) // 2
    return escape(f"{plain[:head]}…{plain[-tail:]}")


def opaque_in_legend(trace: Plain) -> list[Plain]:
    """Return a translucent trace, and before it one without points that the legend shows."""
    group = trace.get("legendgroup", trace["name"])
    shown = {key: trace[key] for key in ("type", "mode", "name", "line")}
    return [
        shown | {"x": [None], "y": [None], "legendgroup": group, "showlegend": True},
        trace | {"legendgroup": group, "showlegend": False},
    ]


def rounded(value: float | None) -> float | None:
    """Return a value with six significant digits, which keeps the file small."""
    return None if value is None else float(f"{value:.6g}")


def number_text(value: float) -> str:
    """Return a number for a label: whole, or with three significant digits."""
    return str(int(value)) if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"


def metric_axis(metric: Metric, title: str) -> Plain:
    """Return an axis of values of a metric."""
    return {"title": {"text": title}} | tick_format(metric)


def tick_format(metric: Metric) -> Plain:
    """Return the format of an axis: whole percentages of shares, else what Plotly chooses."""
    return {"tickformat": ".0%"} if metric.is_share else {}


def setting_axis(axis: Axis) -> Plain:
    """Return the axis of a setting."""
    found: Plain = {"title": {"text": label(axis.name)}}
    if not axis.is_numeric:
        return found | {"type": "category"}
    if not axis.is_log:
        return found
    numbers = [float(v) for v in axis.values.values() if v is not None]
    is_long = max(numbers) / min(numbers) >= LONG
    return found | {"type": "log", "dtick": 1 if is_long else "D2", "tickformat": "~g"}


def points(
    name: str,
    kind: str,
    numbers: Sequence[int],
    x: Iterable[Any],
    y: Iterable[float | None],
    **more: Any,
) -> Plain:
    """Return a trace of points, one a trial.

    Args:
        name: Name in the legend.
        kind: How the trials ended.
        numbers: Numbers of the trials.
        x: Their x values.
        y: Their y values.
        more: Further keys of the trace.
    """
    colour, _, symbol = STYLES[kind]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": list(x),
        "y": [rounded(value) for value in y],
        "customdata": list(numbers),
        "marker": {
            "color": colour,
            "symbol": symbol,
            "size": 8,
            "line": {"width": 2, "color": colour},
        },
    } | more


def ring(numbers: Sequence[int], x: Sequence[Any], y: Sequence[float | None]) -> list[Plain]:
    """Return traces that mark the winner with a ring, seen on any ground by the edge below it."""
    trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "winner",
        "legendgroup": "winner",
        "x": list(x),
        "y": [rounded(value) for value in y],
        "customdata": list(numbers),
    }
    edge = {"showlegend": False, "hoverinfo": "skip", "marker": _open_circle("--surface", 7)}
    return [trace | edge, trace | {"marker": _open_circle(WINNER, 3)}]


def _open_circle(colour: str, width: int) -> Plain:
    line = {"width": width, "color": colour}
    return {"color": colour, "symbol": "circle-open", "size": 16, "line": line}
