"""The sections of the report: texts, tables and figures, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from drtune_ray.results.report import html
from drtune_ray.results.report.class_figures import confusion_figure, reliability_figure
from drtune_ray.results.report.content import Content
from drtune_ray.results.report.curves import diagnostics, learning_curves
from drtune_ray.results.report.figure import Figure
from drtune_ray.results.report.history import COMPLETED, ends, kind_of
from drtune_ray.results.report.predictions import Predictions, Wrong
from drtune_ray.results.report.space_figures import (
    contours,
    importance_figure,
    parallel_coordinates,
    pareto_figure,
    slices,
)
from drtune_ray.results.report.verdict import Candidate, has_interval
from drtune_ray.results.report.work_figures import timeline
from drtune_ray.results.trials import TrialSummary
from drtune_ray.results.words import by, duration, energy, figure, noun, percent, short


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key: Its id in the page.
        title: Its title.
        parts: Its content in order: HTML, or figures.
    """

    key: str
    title: str
    parts: list[str | Figure] = field(default_factory=list)


def sections(content: Content) -> list[Section]:
    """Return the sections of a report."""
    return [
        Section("result", "Result", list(_result(content))),
        Section("search", "Search", list(_search(content))),
        Section("calibration", "Calibration by epoch", list(_calibration(content))),
        Section("model", "The winner on the validation images", list(_model(content))),
        Section("sealed", "The sealed test split", list(_sealed(content))),
        Section("work", "Work and cost", list(_work(content))),
        Section("trials", "All trials", [_trials(content)]),
    ]


# ---- result


def _result(content: Content) -> Iterator[str]:
    yield f'<p class="verdict">{html.prose(content.verdict.sentence)}</p>'
    yield html.paragraphs(content.verdict.details)
    yield html.facts(_key_facts(content))
    if content.finalists:
        rows = [_finalist(each, content) for each in content.finalists]
        caption = f"Finalists on new seeds{by(content.metric)}"
        yield html.table(list(rows[0]), [list(row.values()) for row in rows], caption)
    if content.leader is not None and content.settings:
        yield html.table(
            ["setting", "value"],
            [[path, short(value)] for path, value in content.settings.items()],
            f"Searched settings of trial {content.leader.label}",
            is_aligned=False,
        )
    yield html.paragraphs(content.notes)


def _key_facts(content: Content) -> dict[str, str]:
    num_done = sum(kind_of(t) != "unfinished" for t in content.searched)
    found = {
        "state": content.state,
        "trials": f"{num_done} of {max(content.num_trials, num_done)} ended",
    }
    if content.evaluation is not None:
        found["test accuracy"] = percent(content.evaluation.test.share)
    if content.history.cost is not None:
        found["time"] = duration(content.history.cost.wall_seconds)
    return found | dict(content.facts)


def _finalist(each: Candidate, content: Content) -> dict[str, html.Cell]:
    """Return the row of a finalist by column; only accuracies have intervals."""
    values = ", ".join(figure(each.metric, value) for value in each.values)
    row: dict[str, html.Cell] = {
        "finalist": each.name,
        "method": each.method,
        "mean": figure(each.metric, each.value) if each.values else "-",
    }
    if has_interval(content.metric):
        found = each.interval(content.num_images) if each.values else None
        row["95 % interval"] = " to ".join(map(percent, found)) if found else "-"
    searched = figure(each.metric, each.trial.best_value)
    return row | {"on each seed": values or "-", "in the search": searched}


# ---- search


def _search(content: Content) -> Iterator[str | Figure]:
    first = (learning_curves(content), pareto_figure(content), parallel_coordinates(content))
    yield from (figure for figure in first if figure is not None)
    if (figure := importance_figure(content)) is not None:
        yield figure
    elif content.axes:
        yield html.paragraphs([f"No importance of the settings: {content.importances.note}."])
    shown = slices(content)
    if shown:
        yield "<h3>Each setting alone</h3>"
        yield html.paragraphs(
            ["Symbols as in the learning curves; the ring is the winner, or the best so far."]
        )
        yield from shown
    if pairs := contours(content):
        yield "<h3>Two settings together</h3>"
        yield from pairs
    if not content.best_values:
        yield html.paragraphs(["No trial has completed an epoch yet."])


def _calibration(content: Content) -> Iterator[str | Figure]:
    figures = diagnostics(content)
    if not figures:
        yield html.paragraphs(["No trial has recorded diagnostics of the calibration."])
    yield from figures


# ---- the model


def _model(content: Content) -> Iterator[str | Figure]:
    found = content.predictions
    if found is None:
        yield html.paragraphs([content.why_no_predictions])
        return
    tables = found.tables
    yield html.facts(
        {
            "accuracy": percent(tables.accuracy),
            "balanced accuracy": percent(tables.balanced_accuracy),
            "macro F1": f"{tables.macro_f1:.3f}",
            "AUROC": "-" if tables.auroc is None else f"{tables.auroc:.3f}",
            "log loss": f"{tables.log_loss:.3f}",
            "calibration error": f"{tables.calibration_error:.3f}",
            "images": str(tables.num_images),
        }
    )
    yield html.paragraphs(
        [
            "The shipped weights on the validation images. The search chose among trials by these "
            "images: the figures are optimistic, and the sealed test split is not."
        ]
    )
    yield confusion_figure(tables)
    yield reliability_figure(tables)
    rows: list[list[html.Cell]] = [
        [row.name, row.support, _percent(row.precision), _percent(row.recall), _percent(row.f1)]
        for row in sorted(tables.classes, key=lambda row: (row.f1 is None, row.f1 or 0.0))
    ]
    headers = ["class", "images", "precision", "recall", "F1"]
    yield html.table(headers, rows, "Classes, the weakest first")
    yield _mistakes(found)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _mistakes(found: Predictions) -> str:
    if not found.worst:
        return html.paragraphs(["No validation image is misclassified."])
    total = len(found.tables.mistakes)
    title = f"<h3>The worst mistakes: {len(found.worst)} of {total}, the most confident first</h3>"
    if not any(wrong.picture for wrong in found.worst):
        rows = [
            [wrong.path, wrong.true, wrong.predicted, f"{wrong.probability:.1%}"]
            for wrong in found.worst
        ]
        return title + html.table(["image", "class", "predicted as", "probability"], rows)
    return title + f'<ul class="pictures">{"".join(map(_picture, found.worst))}</ul>'


def _picture(wrong: Wrong) -> str:
    shown = (
        f'<img src="{html.text(wrong.picture)}" alt="{html.text(wrong.path)}">'
        if wrong.picture
        else ""
    )
    return (
        f"<li>{shown}<span><b>{html.text(wrong.true)}</b> predicted as "
        f"<b>{html.text(wrong.predicted)}</b>, {wrong.probability:.1%}</span>"
        f'<span class="path">{html.text(wrong.path)}</span></li>'
    )


# ---- the sealed split


def _sealed(content: Content) -> Iterator[str]:
    found = content.evaluation
    if found is not None:
        low, high = found.test.interval
        yield html.paragraphs(
            [
                f"Test accuracy {percent(found.test.share)} ({found.test.num_correct} of "
                f"{found.test.num_images} images; 95 % interval {percent(low)} to "
                f"{percent(high)}), measured on {_time(found.time_ms)} at "
                f"opening {found.num_openings} of this split."
            ]
        )
    elif content.openings:
        yield html.paragraphs(["This split was opened, though not for the present model."])
    else:
        yield html.paragraphs(
            [
                "The test split has not been opened; drtune-ray evaluate opens it for the "
                "winner. This report never reads its images."
            ]
        )
    if content.openings:
        rows = [[_time(each["time_ms"]), str(each["model"])] for each in content.openings]
        yield html.table(["time", "model"], rows, "Recorded openings of this test split")


def _time(time_ms: int) -> str:
    return f"{datetime.fromtimestamp(time_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"


# ---- work


def _work(content: Content) -> Iterator[str | Figure]:
    if (figure := timeline(content)) is not None:
        yield figure
    if content.trials:
        ways: list[list[html.Cell]] = [
            [outcome, kind, number] for kind, outcome, number in ends(content.trials)
        ]
        yield html.table(["outcome", "kind", "trials"], ways, "How trials ended")
        failed = [t for t in content.trials if kind_of(t) not in (COMPLETED, "unfinished")]
        if not failed:
            yield html.paragraphs(["No trial was stopped or failed."])
    cost = content.history.cost
    if cost is not None:
        rows: list[list[html.Cell]] = [
            ["from the first start to the last end", duration(cost.wall_seconds)],
            ["sum over all trials", duration(cost.trial_seconds)],
            ["of it in trials without a result", duration(cost.stopped_seconds)],
            ["epochs trained", str(cost.num_epochs)],
        ]
        if cost.epoch_seconds is not None:
            rows.append(["median time of an epoch", f"{cost.epoch_seconds:.3g} s"])
        if cost.best_after_seconds is not None:
            after = duration(cost.best_after_seconds)
            rows.append([f"until the search's best {noun(content.metric)}", after])
        if cost.energy_joules is not None:
            what = "energy of the CPUs and GPUs of the machine that ran the command"
            rows.append([what, energy(cost.energy_joules)])
        yield html.table(["what", "cost"], rows, "Cost")


def _trials(content: Content) -> str:
    axes = content.axes
    best = f"best {noun(content.metric)}"
    headers = ["trial", "method", "state", "outcome", best, "epochs", "time"]
    rows = [
        [*_trial(trial), *(short(axis.values.get(trial.number)) for axis in axes)]
        for trial in content.trials
    ]
    if not rows:
        return html.paragraphs(["No trial has started yet."])
    whole = html.table([*headers, *(axis.name for axis in axes)], rows, "Trials by number")
    return html.folded(f"Show the {len(rows)} trials", whole) if len(rows) > 10 else whole


def _trial(trial: TrialSummary) -> Iterable[html.Cell]:
    seconds = None if trial.seconds is None else duration(trial.seconds)
    method = str(trial.config.get("method", {}).get("name", "-"))
    return (
        trial.label,
        method,
        trial.state,
        trial.outcome,
        figure(trial.metric, trial.best_value),
        trial.num_epochs,
        seconds,
    )
