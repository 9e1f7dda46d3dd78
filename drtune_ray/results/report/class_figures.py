"""Figures of the winner's predictions: confusion matrix and reliability diagram."""

from __future__ import annotations

from drtune_ray.results.class_tables import ClassTables
from drtune_ray.results.report.figure import SCALE, WINNER, Cell, Figure, Table, label, rounded

MAX_CLASSES = 40  # in the matrix
MAX_NUMBERED = 12  # classes up to which the cells bear their numbers
CELL = 26


def confusion_figure(tables: ClassTables) -> Figure:
    """Return the confusion matrix; of many classes those that are confused most."""
    chosen = _chosen(tables)
    names = [label(tables.classes[i].name, 20) for i in chosen]
    counts = [[tables.matrix[i][j] for j in chosen] for i in chosen]
    shares = [
        [
            rounded(count / tables.classes[i].support) if tables.classes[i].support else 0
            for count in row
        ]
        for i, row in zip(chosen, counts, strict=True)
    ]
    left_out = len(tables.classes) - len(chosen)
    note = f" The {left_out} classes with the fewest confusions are left out." if left_out else ""
    trace = {
        "type": "heatmap",
        "x": list(range(len(names))),
        "y": list(range(len(names))),
        "z": shares,
        "customdata": counts,
        "zmin": 0,
        "zmax": 1,
        "xgap": 1,
        "ygap": 1,
        "colorscale": SCALE,
        "colorbar": {"tickformat": ".0%", "thickness": 12, "outlinewidth": 0},
        "hovertemplate": "class %{y}: %{customdata} images as class %{x}<extra></extra>",
    }
    if len(names) <= MAX_NUMBERED:
        trace |= {"text": counts, "texttemplate": "%{text}"}
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": names}
    rows: list[list[Cell]] = [
        [pair.true, pair.predicted, pair.num_images, f"{pair.share:.1%}"]
        for pair in tables.confusions()[:20]
    ]
    return Figure(
        "confusion-matrix",
        "Confusion matrix",
        "Share of each class's images (row) that the winner predicts as each class (column)."
        f"{note}",
        [trace],
        {
            "xaxis": ticks | {"title": {"text": "predicted class"}, "showgrid": False},
            "yaxis": ticks
            | {"title": {"text": "class"}, "autorange": "reversed", "showgrid": False},
        },
        height=max(360, 170 + CELL * len(names)),
        min_width=min(900, 220 + CELL * len(names)),
        is_small=len(names) <= MAX_NUMBERED,
        table=Table(["class", "predicted as", "images", "share of the class"], rows),
    )


def _chosen(tables: ClassTables) -> list[int]:
    """Return the classes that are shown, in the order of the model's outputs."""
    wrong = [
        sum(row) - row[i] + sum(other[i] for j, other in enumerate(tables.matrix) if j != i)
        for i, row in enumerate(tables.matrix)
    ]
    most = sorted(range(len(wrong)), key=lambda i: -wrong[i])[:MAX_CLASSES]
    return sorted(most)


def reliability_figure(tables: ClassTables) -> Figure:
    """Return accuracy by confidence, beside the diagonal of perfect calibration."""
    bins = [each for each in tables.bins if each.num_images]
    bars = {
        "type": "bar",
        "name": "accuracy",
        "x": [rounded((each.lower + each.upper) / 2) for each in bins],
        "y": [rounded(each.accuracy) for each in bins],
        "width": [rounded(each.upper - each.lower) for each in bins],
        "customdata": [each.num_images for each in bins],
        "marker": {"color": "--completed", "line": {"width": 1, "color": "--surface"}},
        "hovertemplate": "%{customdata} images: accuracy %{y:.1%}<extra></extra>",
    }
    mean = {
        "type": "scatter",
        "mode": "markers",
        "name": "mean confidence",
        "x": [rounded(each.confidence) for each in bins],
        "y": [rounded(each.accuracy) for each in bins],
        "marker": {"color": WINNER, "symbol": "diamond", "size": 8},
        "hovertemplate": "mean confidence %{x:.1%}, accuracy %{y:.1%}<extra></extra>",
    }
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "name": "perfect calibration",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "--axis", "dash": "dash", "width": 2},
        "hoverinfo": "skip",
    }
    rows = [
        [
            f"{e.lower:.0%} to {e.upper:.0%}",
            e.num_images,
            _percent(e.confidence),
            _percent(e.accuracy),
        ]
        for e in bins
    ]
    return Figure(
        "reliability-diagram",
        "Reliability diagram",
        "Accuracy of the images by the confidence of their prediction. Below the dashed line the "
        "model is too sure of itself, above it too modest. Expected calibration error: "
        f"{tables.calibration_error:.3f}.",
        [bars, diagonal, mean],
        {
            "xaxis": {"title": {"text": "confidence"}, "tickformat": ".0%", "range": [0, 1]},
            "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".0%", "range": [0, 1.02]},
        },
        height=420,
        is_small=True,
        table=Table(["confidence", "images", "mean confidence", "accuracy"], rows),
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"
