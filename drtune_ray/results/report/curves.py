"""Figures by epoch: learning curves, and what the calibration did."""

from __future__ import annotations

from collections.abc import Sequence

from drtune_ray.results.report.content import Content
from drtune_ray.results.report.figure import (
    STYLES,
    WINNER,
    Figure,
    Plain,
    metric_axis,
    opaque_in_legend,
    rounded,
)
from drtune_ray.results.report.history import COMPLETED, KINDS, kind_of
from drtune_ray.results.trials import TrialSummary
from drtune_ray.results.words import form
from drtune_ray.training.reports import OBJECTIVE

EPOCH_AXIS = {"title": {"text": "epoch"}, "rangemode": "tozero"}
MANY = 40  # trials from which lines are fainter
# Metric: title, unit on the axis, what it says.
DIAGNOSTICS: dict[str, tuple[str, str, str]] = {
    "semantic_drift": (
        "Semantic drift",
        "distance",
        "Mean distance of the class centres of pretrained and downstream features: what the "
        "calibration corrects.",
    ),
    "semantic_drift_remaining": (
        "Drift after calibration",
        "distance",
        "The same distance after calibration; the lower, the better the calibration.",
    ),
    "rotation_angle": (
        "Angle of the rotation",
        "degrees",
        "Angle by which the global rotation turns the pretrained features.",
    ),
    "head_agreement": (
        "Agreement of the head",
        "share",
        "Share of the bank for which the head predicts the same class from calibrated pretrained "
        "and from downstream features.",
    ),
    "dr_gradient_share": (
        "Share of DR in the head's gradient",
        "share",
        "How much of the head's gradient comes from the distribution regularization; below 0.1 the "
        "training is CE-tuning in all but name.",
    ),
    "sparse_class_share": (
        "Classes with too few rows",
        "share",
        "Share of the classes with fewer than two rows in the bank; a larger bank lowers it.",
    ),
    "val_calibration_error": (
        "Calibration error of the classifier",
        "error",
        "Expected calibration error on the validation images: how far its confidence is from its "
        "accuracy.",
    ),
}


def learning_curves(content: Content) -> Figure | None:
    """Return the metric that chooses by epoch; trials that were stopped end in a mark."""
    shown = [t for t in content.searched if _measured(content, t.number)[0]]
    if not shown:
        return None
    opacity = 0.35 if len(shown) > MANY else 0.75
    data: list[Plain] = []
    for kind in reversed(KINDS):
        of_kind = [trial for trial in shown if kind_of(trial) == kind]
        if of_kind:
            data += _curves(content, of_kind, kind, opacity)
    if content.leader is not None and content.leader in shown:
        measured = _measured(content, content.leader.number)
        data.append(_highlighted(content.leader, *measured, form(content.metric)))
    label = content.metric.label
    return Figure(
        "learning-curves",
        "Learning curves",
        f"{label[:1].upper()}{label[1:]} by epoch, one line a trial of the search. A trial that "
        "did not complete ends in the mark of its legend; the thick line is "
        f"trial {content.leader.label if content.leader else '-'}.",
        data,
        {"xaxis": EPOCH_AXIS, "yaxis": metric_axis(content.metric, label)},
        height=460,
    )


def _measured(content: Content, number: int) -> tuple[list[int], list[float]]:
    """Return epochs and values; the best so far where only Optuna knows a trial."""
    measured = content.history.curve(number, content.metric.measure)
    return measured if measured[0] else content.history.curve(number, OBJECTIVE)


def _curves(
    content: Content, trials: Sequence[TrialSummary], kind: str, opacity: float
) -> list[Plain]:
    colour, dash, symbol = STYLES[kind]
    x: list[int | None] = []
    y: list[float | None] = []
    numbers: list[int | None] = []
    ends: list[tuple[int, float, int]] = []
    for trial in trials:
        epochs, values = _measured(content, trial.number)
        x += [*epochs, None]
        y += [*map(rounded, values), None]
        numbers += [trial.number] * len(epochs) + [None]
        ends.append((epochs[-1], values[-1], trial.number))
    shown = f"%{{y:{form(content.metric)}}}"
    hover = f"trial %{{customdata}}, epoch %{{x}}: {shown}<extra></extra>"
    name = f"{kind} ({len(trials)})"
    shared = {"type": "scatter", "name": name, "legendgroup": kind, "hovertemplate": hover}
    lines = shared | {
        "mode": "lines",
        "x": x,
        "y": y,
        "customdata": numbers,
        "opacity": opacity,
        "line": {"color": colour, "width": 1.5, "dash": dash},
        "showlegend": False,
    }
    if kind == COMPLETED:
        return opaque_in_legend(lines)
    marks = shared | {
        "mode": "markers",
        "x": [epoch for epoch, _, _ in ends],
        "y": [rounded(value) for _, value, _ in ends],
        "customdata": [number for _, _, number in ends],
        "marker": {
            "color": colour,
            "symbol": symbol,
            "size": 8,
            "line": {"width": 2, "color": colour},
        },
    }
    return [lines, marks]


def _highlighted(
    trial: TrialSummary, epochs: Sequence[int], values: Sequence[float], shown: str
) -> Plain:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(epochs) < 30 else "lines",
        "name": f"trial {trial.label}",
        "x": list(epochs),
        "y": [rounded(value) for value in values],
        "line": {"color": WINNER, "width": 3},
        "marker": {"size": 6, "color": WINNER},
        "hovertemplate": f"trial {trial.number}, epoch %{{x}}: %{{y:{shown}}}<extra></extra>",
    }


def diagnostics(content: Content) -> list[Figure]:
    """Return a figure for each diagnostic of the calibration that the trials recorded."""
    figures = []
    for metric, (title, unit, caption) in DIAGNOSTICS.items():
        shown = [t for t in content.searched if content.history.curve(t.number, metric)[0]]
        if shown:
            figures.append(_diagnostic(content, shown, metric, title, unit, caption))
    return figures


def _diagnostic(
    content: Content,
    shown: Sequence[TrialSummary],
    metric: str,
    title: str,
    unit: str,
    caption: str,
) -> Figure:
    x: list[int | None] = []
    y: list[float | None] = []
    numbers: list[int | None] = []
    for trial in shown:
        epochs, values = content.history.curve(trial.number, metric)
        x += [*epochs, None]
        y += [*map(rounded, values), None]
        numbers += [trial.number] * len(epochs) + [None]
    others: Plain = {
        "type": "scatter",
        "mode": "lines",
        "name": "trials",
        "x": x,
        "y": y,
        "customdata": numbers,
        "opacity": 0.35 if len(shown) > MANY else 0.7,
        "line": {"color": "--completed", "width": 1.2},
        "hovertemplate": "trial %{customdata}, epoch %{x}: %{y:.4g}<extra></extra>",
    }
    best = _best_of(content, shown)
    return Figure(
        f"diagnostic-{metric.replace('_', '-')}",
        title,
        f"{caption} The thick line is trial {best.label}.",
        [others, _highlighted(best, *content.history.curve(best.number, metric), ".4g")],
        {
            "xaxis": EPOCH_AXIS,
            "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
            "showlegend": False,
        },
        height=260,
        is_small=True,
    )


def _best_of(content: Content, shown: Sequence[TrialSummary]) -> TrialSummary:
    """Return the leader if it is shown, else the best one that completed or still may."""
    if content.leader is not None and content.leader in shown:
        return content.leader
    return max(shown, key=lambda t: (t.state == "COMPLETE", t.score, -t.number))
