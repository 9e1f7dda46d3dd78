"""The comparison as one page: the answer, a picture of the differences, and the tables."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from drtune_ray.folders import atomic_write
from drtune_ray.results.comparison.compared import BETTER, TOO_FEW_SEEDS, WORSE
from drtune_ray.results.comparison.result import PAGE_NAME, ComparisonResult
from drtune_ray.results.comparison.table import HEADERS, cells
from drtune_ray.results.comparison.words import counted, span
from drtune_ray.results.report import html
from drtune_ray.results.report.figure import Figure, label, rounded
from drtune_ray.results.report.page import page
from drtune_ray.results.report.sections import Section
from drtune_ray.results.words import title

# Colour and symbol of a verdict: no two differ by colour alone.
STYLES = {
    BETTER: ("--unfinished", "circle", "better"),
    WORSE: ("--stopped", "square", "worse"),
}
OPEN = ("--failed", "circle-open", "cannot be told apart")
ROW_HEIGHT, MARGIN = 52, 110


def write_page(result: ComparisonResult) -> None:
    """Write the page into the folder of the comparison."""
    content = comparison_page(result)
    path = result.folder / PAGE_NAME
    atomic_write(path, lambda temporary: temporary.write_text(content, "utf-8"), is_durable=False)


def comparison_page(result: ComparisonResult) -> str:
    """Return the comparison as HTML."""
    compared, other = result.compared, title(result.compared.baseline)
    answer = f'<p class="verdict">{html.prose(result.conclusion)}.</p>'
    what = (
        f"{counted(compared.num_seeds, 'seed')} a method, {compared.num_images} images of the "
        f"sealed test split (opening {result.num_openings})"
    )
    parts: list[str | Figure] = [answer, html.paragraphs([what]), differences_figure(result)]
    sentences = [f"{text}." for text in result.sentences.values()]
    rows = [cells(result, name) for name in result.methods]
    table = html.table(HEADERS, rows, f"Differences are to {other}, in points of accuracy")
    sections = [
        Section("result", "Result", parts),
        Section("methods", "Each method", [html.paragraphs(sentences), table]),
        Section("seeds", "Accuracies of the seeds", [accuracies_figure(result)]),
        Section("settings", "Chosen settings", [_settings(result)]),
    ]
    time = datetime.fromtimestamp(result.time_ms / 1000, UTC)
    footer = f"Test split opened {time:%Y-%m-%d %H:%M} UTC."
    return page("Comparison of methods by drtune-ray", result.name, sections, footer)


def differences_figure(result: ComparisonResult) -> Figure:
    """Return the picture: a point and its interval for each method, right of 0 where it wins."""
    compared, other = result.compared, title(result.compared.baseline)
    by_mean = sorted(compared.differences, key=lambda name: compared.differences[name].mean)
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


def accuracies_figure(result: ComparisonResult) -> Figure:
    """Return the accuracy of every seed, seeds of a number side by side in all methods."""
    scores = result.compared.scores
    order = sorted(scores, key=lambda name: scores[name].mean)
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": label(title(name)),
            "x": [rounded(value) for value in scores[name].accuracies],
            "y": [label(title(name))] * len(scores[name].accuracies),
            "marker": {"color": "--completed", "symbol": "circle-open", "size": 9},
            "text": [f"seed {seed}" for seed in result.methods[name].seeds],
        }
        for name in order
    ]
    layout = {
        "xaxis": {"title": {"text": "accuracy on the test split"}, "tickformat": ".1%"},
        "yaxis": {"type": "category", "automargin": True},
        "showlegend": False,
    }
    caption = "One mark a seed; a seed has the same initial head and views in all methods."
    height = MARGIN + ROW_HEIGHT * len(traces)
    return Figure("accuracies", "Seeds", caption, traces, layout, height=height)


def _settings(result: ComparisonResult) -> str:
    rows = [
        (title(name), path, str(value))
        for name, runs in result.methods.items()
        for path, value in runs.settings.items()
    ]
    return html.table(("method", "setting", "value"), rows, is_aligned=False)
