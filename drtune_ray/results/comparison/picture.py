"""The comparison as one page: the answer, a picture of the differences, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from drtune_ray.folders import atomic_write
from drtune_ray.results.comparison.compared import BETTER, TOO_FEW_SEEDS, WORSE
from drtune_ray.results.comparison.result import PAGE_NAME, ComparisonResult
from drtune_ray.results.comparison.table import HEADERS, cells
from drtune_ray.results.comparison.words import held_fixed, span, tested_on
from drtune_ray.results.report import html
from drtune_ray.results.report.figure import Figure, label, rounded
from drtune_ray.results.report.page import page
from drtune_ray.results.report.sections import Section
from drtune_ray.results.words import title, without_share

# Colour and symbol of a verdict: no two differ by colour alone.
STYLES = {
    BETTER: ("--unfinished", "circle", "better"),
    WORSE: ("--stopped", "square", "worse"),
}
OPEN = ("--failed", "circle-open", "cannot be told apart")
# Colour, symbol and dash of the methods' learning curves; later ones begin anew.
CURVES = (
    ("--completed", "circle", "solid"),
    ("--stopped", "square", "dash"),
    ("--impossible", "diamond", "dot"),
    ("--failed", "cross", "dashdot"),
)
ROW_HEIGHT, MARGIN = 52, 110


def write_page(result: ComparisonResult) -> None:
    """Write the page into the folder of the comparison."""
    content = comparison_page(result)
    path = result.folder / PAGE_NAME
    atomic_write(path, lambda temporary: temporary.write_text(content, "utf-8"), is_durable=False)


def comparison_page(result: ComparisonResult) -> str:
    """Return the comparison as HTML."""
    compared, other = result.compared, _baseline(result)
    answer = f'<p class="verdict">{html.prose(result.conclusion)}.</p>'
    parts: list[str | Figure] = [
        answer,
        html.paragraphs([tested_on(compared, result.num_openings), f"{held_fixed(compared)}."]),
        differences_figure(result),
    ]
    if len({runs.share for runs in result.methods.values()}) > 1:
        parts.append(shares_figure(result))
    what = "folds" if compared.is_folds else "seeds"
    sentences = [f"{text}." for text in (*result.sentences.values(), *result.gradient_shares)]
    rows = [cells(result, name) for name in result.methods]
    table = html.table(HEADERS, rows, f"Differences are to {other}, in points of accuracy")
    sections = [
        Section("result", "Result", parts),
        Section("methods", "Each method", [html.paragraphs(sentences), table]),
        Section("seeds", f"Accuracies of the {what}", [accuracies_figure(result)]),
        Section("settings", "Chosen settings", [_settings(result)]),
    ]
    time = datetime.fromtimestamp(result.time_ms / 1000, UTC)
    footer = f"Test split opened {time:%Y-%m-%d %H:%M} UTC."
    return page("Comparison of methods by drtune-ray", result.name, sections, footer)


def _baseline(result: ComparisonResult) -> str:
    """Return the name of the baseline, which several shares of the images have in common."""
    return title(without_share(result.compared.baselines[0]))


def differences_figure(result: ComparisonResult) -> Figure:
    """Return the picture: a point and its interval for each method, right of 0 where it wins."""
    compared, other = result.compared, _baseline(result)
    by_mean = sorted(
        compared.differences,
        key=lambda name: (result.methods[name].share, compared.differences[name].mean),
    )
    traces = [_difference_trace(result, name) for name in by_mean]
    ends = [
        100 * end
        for found in compared.differences.values()
        for end in (found.interval.low, found.interval.high)
    ]
    reach = max(0.5, *map(abs, ends)) * 1.15
    layout = {
        "xaxis": {
            "title": {"text": f"points of accuracy above {label(other)} →"},
            "range": [-reach, reach],
            "zeroline": False,
        },
        "yaxis": {"type": "category", "automargin": True},
        "showlegend": False,
        "shapes": [
            {
                "type": "line",
                "x0": 0,
                "x1": 0,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": "--ink", "width": 2},
            }
        ],
    }
    caption = (
        f"Difference of each method to {other} (the line at 0), with its 95 % interval. Filled "
        "marks are decided, open ones are not."
    )
    return Figure(
        "differences",
        f"Better than {other}?",
        caption,
        traces,
        layout,
        height=MARGIN + ROW_HEIGHT * len(traces),
    )


def _difference_trace(result: ComparisonResult, name: str) -> dict[str, Any]:
    found = result.compared.differences[name]
    colour, symbol, word = STYLES.get(found.verdict, OPEN)
    if found.verdict == TOO_FEW_SEEDS:
        word = "too few seeds"
    text = f"{label(title(name))}: {span(found)}, {word}"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(title(name)),
        "x": [rounded(100 * found.mean)],
        "y": [label(title(name))],
        "hovertext": [text],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 14, "line": {"width": 3}},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [rounded(100 * (found.interval.high - found.mean))],
            "arrayminus": [rounded(100 * (found.mean - found.interval.low))],
            "color": colour,
            "thickness": 4,
            "width": 8,
        },
    }


def shares_figure(result: ComparisonResult) -> Figure:
    """Return the learning curves: accuracy of each method by its share of the training images."""
    names: dict[str, list[str]] = {}
    for name in sorted(result.methods, key=lambda name: result.methods[name].share):
        names.setdefault(without_share(name), []).append(name)
    traces = [
        _share_trace(result, method, of_method, CURVES[number % len(CURVES)])
        for number, (method, of_method) in enumerate(names.items())
    ]
    ticks = sorted({100 * runs.share for runs in result.methods.values()})
    layout = {
        "xaxis": {
            "title": {"text": "share of the training images"},
            "type": "log",
            "tickvals": ticks,
            "ticktext": [f"{tick:g} %" for tick in ticks],
        },
        "yaxis": {"title": {"text": "accuracy on the test split"}, "tickformat": ".1%"},
    }
    caption = (
        "Mean over the seeds with its 95 % interval. Each method was searched anew for each share; "
        "validation and test images are the same."
    )
    return Figure("shares", "With fewer training images", caption, traces, layout)


def _share_trace(
    result: ComparisonResult, method: str, names: Sequence[str], style: tuple[str, str, str]
) -> dict[str, Any]:
    colour, symbol, dash = style
    scores = [result.compared.scores[name] for name in names]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label(title(method)),
        "x": [rounded(100 * result.methods[name].share) for name in names],
        "y": [rounded(score.mean) for score in scores],
        "line": {"color": colour, "dash": dash},
        "marker": {"color": colour, "symbol": symbol, "size": 10},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [rounded(score.interval.high - score.mean) for score in scores],
            "arrayminus": [rounded(score.mean - score.interval.low) for score in scores],
            "color": colour,
        },
    }


def accuracies_figure(result: ComparisonResult) -> Figure:
    """Return the accuracy of every seed or fold."""
    scores, what = result.compared.scores, "fold" if result.compared.is_folds else "seed"
    order = sorted(scores, key=lambda name: scores[name].mean)
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": label(title(name)),
            "x": [rounded(value) for value in scores[name].accuracies],
            "y": [label(title(name))] * len(scores[name].accuracies),
            "marker": {"color": "--completed", "symbol": "circle-open", "size": 9},
            "text": [f"{what} {seed}" for seed in result.methods[name].seeds],
        }
        for name in order
    ]
    layout = {
        "xaxis": {"title": {"text": "accuracy on the test split"}, "tickformat": ".1%"},
        "yaxis": {"type": "category", "automargin": True},
        "showlegend": False,
    }
    same = "images" if result.compared.is_folds else "initial head and views"
    caption = f"One mark a {what}; a {what} has the same {same} in all methods."
    height = MARGIN + ROW_HEIGHT * len(traces)
    return Figure("accuracies", f"{what.title()}s", caption, traces, layout, height=height)


def _settings(result: ComparisonResult) -> str:
    rows = [
        (title(name), path, str(value))
        for name, runs in result.methods.items()
        for path, value in runs.settings.items()
    ]
    return html.table(("method", "setting", "value"), rows, is_aligned=False)
