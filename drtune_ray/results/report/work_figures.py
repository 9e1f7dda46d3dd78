"""Figures of the work: when and where trials ran, and how they ended."""

from __future__ import annotations

from drtune_ray.results.report.content import Content
from drtune_ray.results.report.figure import STYLES, Figure, Plain, label
from drtune_ray.results.report.history import KINDS, Span, kind_of

LANE_HEIGHT = 30
FINALS = "final"


def timeline(content: Content) -> Figure | None:
    """Return a bar for each time that a trial ran, one row for each place on a machine."""
    spans = content.history.spans
    if not spans:
        return None
    by_number = {trial.number: trial for trial in content.trials}
    rows = sorted({(span.host, span.lane) for span in spans}, reverse=True)
    data: list[Plain] = []
    for kind in KINDS:
        of_kind = [
            span
            for span in spans
            if span.number in by_number and kind_of(by_number[span.number]) == kind
        ]
        if of_kind:
            data.append(_bars(kind, of_kind))
    return Figure(
        "timeline",
        "Timeline",
        "When each trial ran; one row for each trial that a machine ran at the same time. A "
        "resumed trial has several bars.",
        data,
        {
            "barmode": "overlay",
            "bargap": 0.25,
            "xaxis": {"type": "date", "title": {"text": "time (UTC)"}},
            "yaxis": {
                "type": "category",
                "categoryorder": "array",
                "categoryarray": [_row(host, lane) for host, lane in rows],
            },
        },
        height=140 + LANE_HEIGHT * len(rows),
    )


def _bars(kind: str, spans: list[Span]) -> Plain:
    colour, _, _ = STYLES[kind]
    shapes = dict(zip(KINDS, ("", "/", "x", "-", "."), strict=True))
    return {
        "type": "bar",
        "orientation": "h",
        "name": kind,
        "y": [_row(span.host, span.lane) for span in spans],
        "base": [span.start_ms for span in spans],
        "x": [span.end_ms - span.start_ms for span in spans],
        "customdata": [
            [span.number, round((span.end_ms - span.start_ms) / 1000)] for span in spans
        ],
        "marker": {
            "color": colour,
            "pattern": {
                "shape": shapes[kind],
                "fillmode": "overlay",
                "fgcolor": "--surface",
                "size": 6,
                "solidity": 0.25,
            },
            "line": {"width": 1, "color": "--surface"},
        },
        "hovertemplate": "trial %{customdata[0]}: %{customdata[1]} s<extra></extra>",
    }


def _row(host: str, lane: int) -> str:
    return f"{label(host, 18)} · {lane + 1}"
