"""Figures of the search space: what was tried, and what mattered."""

from __future__ import annotations

import math
from collections.abc import Sequence

from drtune_ray.config.metric import Metric
from drtune_ray.results.report.content import Content
from drtune_ray.results.report.figure import (
    PERCENT,
    SCALE,
    STYLES,
    WINNER,
    Figure,
    Plain,
    Table,
    label,
    metric_axis,
    number_text,
    opaque_in_legend,
    points,
    ring,
    rounded,
    setting_axis,
    tick_format,
)
from drtune_ray.results.report.history import COMPLETED, KINDS, STOPPED, kind_of
from drtune_ray.results.report.settings import (
    BANK_SIZE,
    LAMBDA,
    LEARNING_RATE,
    Axis,
    Contour,
    contour,
)
from drtune_ray.results.trials import TrialSummary
from drtune_ray.results.words import form, noun, short

FIFTHS = 5
MANY = 40  # trials from which lines and points are fainter
BAND = ("lowest fifth", "second fifth", "middle fifth", "fourth fifth", "highest fifth")
AXIS_WIDTH = 110  # of parallel coordinates, in pixels


# ---- parallel coordinates


def parallel_coordinates(content: Content) -> Figure | None:
    """Return one line a trial across all searched settings to its value."""
    axes, values, metric = content.axes, content.best_values, content.metric
    shown = [t for t in content.searched if t.number in values]
    if not axes or len(shown) < 2:
        return None
    places = [_Places(axis, [t.number for t in shown]) for axis in axes]
    last = _Places(Axis("", noun(metric), False, dict(values)), list(values))
    completed = sorted((t for t in shown if kind_of(t) == COMPLETED), key=lambda t: t.score)
    bands = BAND if metric.direction == "maximize" else BAND[::-1]  # from the worst to the best
    shown_as = form(metric)
    stopped = [t for t in shown if kind_of(t) != COMPLETED]
    opacity = 0.5 if len(shown) > MANY else 0.9
    data = (
        opaque_in_legend(
            _lines("not completed", stopped, places, last, shown_as, "--stopped", "dot", 0.4)
        )
        if stopped
        else []
    )
    for band in range(FIFTHS):
        part = completed[len(completed) * band // FIFTHS : len(completed) * (band + 1) // FIFTHS]
        if part:
            lines = (bands[band], part, places, last, shown_as, f"--line{band}", "solid", opacity)
            data += opaque_in_legend(_lines(*lines))
    if content.leader is not None and content.leader.number in values:
        name = f"trial {content.leader.label}"
        lines = (name, [content.leader], places, last, shown_as, WINNER, "solid", 1.0)
        data.append(_lines(*lines, 3.5))
    better = "higher" if metric.direction == "maximize" else "lower"
    return Figure(
        "parallel-coordinates",
        "Parallel coordinates",
        f"One line a trial, from its settings on the left to its {noun(metric)} on the right; the "
        f"darker the line (in dark mode: the lighter), the {better} the {noun(metric)} among the "
        "completed trials. A line with a gap ignores that setting.",
        data,
        _parallel_layout(places, last, form(metric, 1)),
        height=460,
        min_width=AXIS_WIDTH * (len(axes) + 1),
    )


class _Places:
    """Places of the values of a setting on its vertical axis, 0 to 1."""

    def __init__(self, axis: Axis, numbers: Sequence[int]) -> None:
        self.axis = axis
        known = [v for n in numbers if (v := axis.number(n)) is not None]
        self.low, self.high = (min(known), max(known)) if known else (0.0, 1.0)

    def of(self, number: int) -> float | None:
        value = self.axis.number(number)
        return None if value is None else rounded(self.at(value))

    def at(self, value: float) -> float:
        if self.high == self.low:
            return 0.5
        if self.axis.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ends(self) -> list[tuple[float, str]]:
        """Return places with their labels."""
        if not self.axis.is_numeric:
            return [(self.at(i), label(w, 14)) for i, w in enumerate(self.axis.words)]
        if self.low == self.high:
            return [(0.5, number_text(self.low))]
        return [(0.0, number_text(self.low)), (1.0, number_text(self.high))]


def _lines(
    name: str,
    trials: Sequence[TrialSummary],
    places: Sequence[_Places],
    last: _Places,
    shown_as: str,
    colour: str,
    dash: str,
    opacity: float,
    width: float = 1.5,
) -> Plain:
    x: list[int | None] = []
    y: list[float | None] = []
    texts: list[str | None] = []
    for trial in trials:
        x += [*range(len(places) + 1), None]
        y += [*(place.of(trial.number) for place in places), last.of(trial.number), None]
        shown = [short(place.axis.values.get(trial.number)) for place in places]
        values = [*shown, f"{last.axis.number(trial.number) or 0.0:{shown_as}}"]
        texts += [*(f"trial {trial.number}: {label(value)}" for value in values), None]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"{name} ({len(trials)})" if len(trials) > 1 else name,
        "x": x,
        "y": y,
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
        "opacity": opacity,
        "line": {"color": colour, "width": width, "dash": dash},
    }


def _parallel_layout(places: Sequence[_Places], last: _Places, shown_as: str) -> Plain:
    everything = [*places, last]
    annotations: list[Plain] = []
    for at, place in enumerate(everything):
        for y, text in place.ends():
            if place is last:
                text = f"{float(place.low if y < 0.5 else place.high):{shown_as}}"
            annotations.append(_annotation(at, y, text))
    titles = [label(place.axis.name, 16) for place in places] + [last.axis.name]
    return {
        "xaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(everything))),
            "ticktext": titles,
            "side": "bottom",
            "range": [-0.3, len(everything) - 0.7],
            "gridcolor": "--axis",
            "gridwidth": 1,
            "zeroline": False,
        },
        "yaxis": {"visible": False, "range": [-0.08, 1.08]},
        "annotations": annotations,
    }


def _annotation(x: int, y: float, text: str) -> Plain:
    return {
        "x": x,
        "y": y,
        "text": text,
        "showarrow": False,
        "yshift": 12 if y > 0.75 else -12 if y < 0.25 else 0,
        "bgcolor": "--surface",
        "font": {"size": 11},
    }


# ---- importance


def importance_figure(content: Content) -> Figure | None:
    """Return the importance of the settings as bars, one colour an evaluator."""
    shares = content.importances.shares
    if not shares:
        return None
    first = next(iter(shares.values()))
    names = sorted(first, key=lambda name: first[name])
    colours = ("--completed", "--stopped")
    patterns = ("", "/")
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": evaluator,
            "y": [label(name) for name in names],
            "x": [rounded(found.get(name)) for name in names],
            "marker": {"color": colours[i], "pattern": {"shape": patterns[i]}},
            "hovertemplate": f"%{{y}}: %{{x:{PERCENT}}}<extra>{evaluator}</extra>",
        }
        for i, (evaluator, found) in enumerate(shares.items())
    ]
    rows = [[name, *(f"{found.get(name, 0.0):.1%}" for found in shares.values())] for name in names]
    left_out = content.importances.left_out
    note = f" Not all of them have {', '.join(left_out)}, left out here." if left_out else ""
    return Figure(
        "importance",
        "Importance of the settings",
        f"Share of the variation of the {noun(content.metric)} that each setting explains, over "
        f"{content.importances.num_trials} completed trials: by PED-ANOVA among the best of them, "
        f"by fANOVA over the whole space.{note}",
        data,
        {"xaxis": {"tickformat": ".0%", "rangemode": "tozero"}, "barmode": "group"},
        height=130 + 46 * len(names),
        table=Table(["setting", *shares], rows[::-1]),
    )


# ---- slices and contours


def slices(content: Content) -> list[Figure]:
    """Return a figure for each searched setting: its values against the metric."""
    return [_slice(content, axis) for axis in content.axes if content.best_values]


def _slice(content: Content, axis: Axis) -> Figure:
    data, values, metric = [], content.best_values, content.metric
    hover = f"trial %{{customdata}}: %{{x}}, %{{y:{form(metric)}}}<extra></extra>"
    opacity = 0.45 if len(content.searched) > MANY else 0.9
    for kind in reversed(KINDS):
        numbers = [
            t.number
            for t in content.searched
            if kind_of(t) == kind and t.number in values and axis.values.get(t.number) is not None
        ]
        if numbers:
            y = [values[n] for n in numbers]
            known = (kind, kind, numbers, _shown(axis, numbers), y)
            data.append(points(*known, hovertemplate=hover, opacity=opacity))
    leader = content.leader
    if leader is not None and axis.values.get(leader.number) is not None:
        if leader.number in values:
            shown = _shown(axis, [leader.number])
            data += ring([leader.number], shown, [values[leader.number]])
    return Figure(
        f"slice-{axis.path.replace('.', '-').replace('_', '-')}",
        axis.name,
        f"{axis.path} against the best {noun(metric)} of each trial.",
        data,
        {
            "xaxis": setting_axis(axis),
            "yaxis": metric_axis(metric, noun(metric)),
            "showlegend": False,
        },
        height=280,
        is_small=True,
    )


def _shown(axis: Axis, numbers: Sequence[int]) -> list[object]:
    if axis.is_numeric:
        return [rounded(axis.number(n)) for n in numbers]
    return [label(axis.values[n]) for n in numbers]


def contours(content: Content) -> list[Figure]:
    """Return the metric over lambda and the bank's size, and over lambda and learning rate."""
    by_path = {axis.path: axis for axis in content.axes}
    pairs = ((LAMBDA, BANK_SIZE), (LAMBDA, LEARNING_RATE))
    found = [(by_path.get(first), by_path.get(second)) for first, second in pairs]
    return [_contour(content, x, y) for x, y in found if x is not None and y is not None]


def _contour(content: Content, x: Axis, y: Axis) -> Figure:
    completed = {t.number for t in content.searched if kind_of(t) == COMPLETED}
    known = {
        n: v
        for n, v in content.best_values.items()
        if x.number(n) is not None and y.number(n) is not None
    }
    values = {n: v for n, v in known.items() if n in completed}
    others = [n for n in known if n not in completed]
    surface, metric = contour(x, y, values), content.metric
    data = [] if surface is None else [_surface(surface, metric)]
    data.append(_crosses("completed", list(values), x, y, COMPLETED))
    if others:
        data.append(_crosses("not completed", others, x, y, STOPPED))
    leader = content.leader
    if leader is not None and leader.number in known:
        data += ring([leader.number], _shown(x, [leader.number]), [y.number(leader.number)])
    note = "" if surface else " There are too few completed trials to interpolate between them."
    return Figure(
        f"contour-{x.name}-{y.name}".lower(),
        f"{x.name} and {y.name}",
        f"{metric.label[:1].upper()}{metric.label[1:]} over {x.path} and {y.path}, interpolated "
        f"between the completed trials (points); blank where there is none.{note}",
        data,
        {"xaxis": setting_axis(x), "yaxis": setting_axis(y)},
        height=420,
        is_small=True,
    )


def _surface(surface: Contour, metric: Metric) -> Plain:
    """Return the trace of a contour, in the colours of the parallel coordinates."""
    return {
        "type": "contour",
        "x": [rounded(v) for v in surface.x],
        "y": [rounded(v) for v in surface.y],
        "z": [[rounded(v) for v in row] for row in surface.z],
        "colorscale": SCALE,
        "reversescale": metric.direction == "minimize",
        "colorbar": {"thickness": 12, "outlinewidth": 0} | tick_format(metric),
        "contours": {"coloring": "heatmap"},
        "line": {"width": 0.5, "color": "--axis"},
        "hoverinfo": "skip",
        "name": metric.label,
    }


def _crosses(name: str, numbers: list[int], x: Axis, y: Axis, kind: str) -> Plain:
    colour, _, _ = STYLES[kind]
    symbol = "circle" if kind == COMPLETED else "x-thin-open"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": _shown(x, numbers),
        "y": _shown(y, numbers),
        "customdata": numbers,
        "marker": {
            "symbol": symbol,
            "size": 7,
            "color": colour,
            "line": {"width": 1.5, "color": "--surface" if kind == COMPLETED else colour},
        },
        "hovertemplate": "trial %{customdata}: %{x:.3g}, %{y:.3g}<extra></extra>",
    }


# ---- several objectives


def pareto_figure(content: Content) -> Figure | None:
    """Return the trials in the plane of the first two objectives, the front connected."""
    names = list(content.objectives)
    completed = (t for t in content.searched if kind_of(t) == COMPLETED)
    shown = [t for t in completed if set(names) <= t.objectives.keys()]
    if len(names) < 2 or not shown:
        return None
    first, second = names[:2]
    front = sorted(
        (t for t in shown if t.number in content.front), key=lambda t: t.objectives[second]
    )
    rest = [t for t in shown if t.number not in content.front]
    hover = f"trial %{{customdata}}: {second} %{{x:.4g}}, {first} %{{y:.4g}}<extra></extra>"
    data = [
        points(
            name,
            COMPLETED,
            [t.number for t in part],
            [rounded(t.objectives[second]) for t in part],
            [t.objectives[first] for t in part],
            hovertemplate=hover,
            marker={"color": colour, "symbol": symbol, "size": 9},
        )
        for name, colour, symbol, part in (
            ("other completed trials", "--failed", "circle-open", rest),
            ("Pareto front", "--completed", "circle", front),
        )
        if part
    ]
    if front and len(names) == 2:
        data[-1] |= {"mode": "lines+markers", "line": {"shape": _step(content, second), "width": 2}}
    rows = [[t.label, *(rounded(t.objectives.get(name)) for name in names)] for t in front]
    more = "" if len(names) == 2 else " The table has the other objectives."
    return Figure(
        "pareto-front",
        "Pareto front",
        f"No other trial is better in everything than those on the front.{more}",
        data,
        {
            "xaxis": {"title": {"text": f"{second} ({content.objectives[second]})"}},
            "yaxis": {"title": {"text": f"{first} ({content.objectives[first]})"}},
        },
        table=Table(["trial", *names], rows),
    )


def _step(content: Content, second: str) -> str:
    return "hv" if content.objectives[second] == "minimize" else "vh"
