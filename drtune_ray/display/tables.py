"""The class tables of a classifier, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from drtune_ray.display.text import percent
from drtune_ray.values import printable

if TYPE_CHECKING:
    from drtune_ray.results.class_tables import ClassTables
    from drtune_ray.results.labelled import Measured

# A matrix of more classes is wider than a terminal; the pairs that were confused say more.
MATRIX_CLASSES = 10
NUM_SHOWN, MAX_WIDTH = 20, 32


def tables_lines(tables: ClassTables) -> Iterator[str]:
    """Yield metrics, class table, confusions and the most confident mistakes."""
    yield from metric_lines(tables)
    yield ""
    yield from _class_table(tables)
    yield ""
    yield from _confusions(tables)
    if tables.mistakes:
        yield ""
        yield from _mistakes(tables)


def measured_lines(measured: Measured) -> Iterator[str]:
    """Yield the metrics of labelled images that were predicted; nothing if there are none."""
    if measured.num_sealed:
        yield (
            f"{measured.num_sealed} of these images are in the study's sealed test split: they do "
            "not enter the metrics, because `drtune-ray evaluate` opens the split and counts it"
        )
    tables = measured.tables()
    if tables is None:
        return
    yield (
        f"Accuracy {percent(tables.accuracy)} on {tables.num_images} images whose folders name "
        "their classes"
    )
    if measured.num_used:
        yield f"{measured.num_used} of them trained or chose the model: the metrics are too good."
    elif not measured.is_study_known:
        yield "This folder lies apart from its study: whether it trained on them is not known."
    if measured.num_unlabelled:
        yield f"{measured.num_unlabelled} further images have no folder with a name of a class."
    yield from tables_lines(tables)


def metric_lines(tables: ClassTables) -> Iterator[str]:
    """Yield the metrics on a line."""
    auroc = "undefined (one class)" if tables.auroc is None else f"{tables.auroc:.4f}"
    yield (
        f"Balanced accuracy {percent(tables.balanced_accuracy)}, macro F1 "
        f"{percent(tables.macro_f1)}, AUROC {auroc}, log loss {tables.log_loss:.4f}, expected "
        f"calibration error {percent(tables.calibration_error)}"
    )


def _class_table(tables: ClassTables) -> Iterator[str]:
    rows = [row for row in tables.classes if row.support or row.precision is not None]
    if len(rows) > NUM_SHOWN:
        rows = tables.weakest()[:NUM_SHOWN]
        yield f"The {NUM_SHOWN} weakest of {len(tables.classes)} classes (--json has all):"
    cells = [
        (_short(row.name), str(row.support), *map(percent, (row.precision, row.recall, row.f1)))
        for row in rows
    ]
    yield from aligned([("class", "images", "precision", "recall", "F1"), *cells])
    if unseen := [row for row in tables.classes if not row.support]:
        yield f"{len(unseen)} class(es) without images do not enter the means."


def _confusions(tables: ClassTables) -> Iterator[str]:
    if len(tables.classes) <= MATRIX_CLASSES:
        yield "Images by class (rows) and predicted class (columns):"
        names = [_short(row.name) for row in tables.classes]
        body = [(n, *map(str, row)) for n, row in zip(names, tables.matrix, strict=True)]
        yield from aligned([("", *names), *body])
        return
    pairs = tables.confusions()
    yield f"Most confused of {len(pairs)} pairs of classes:" if pairs else "No image is confused."
    cells = [
        (_short(pair.true), "as", _short(pair.predicted), str(pair.num_images), percent(pair.share))
        for pair in pairs[:NUM_SHOWN]
    ]
    yield from aligned(cells)


def _mistakes(tables: ClassTables) -> Iterator[str]:
    shown = tables.mistakes[:NUM_SHOWN]
    more = f", the {NUM_SHOWN} most confident" if len(shown) < len(tables.mistakes) else ""
    yield f"{len(tables.mistakes)} of {tables.num_images} images are misclassified{more}:"
    for each in shown:
        where = printable(each.path) if each.path is not None else f"image {each.row}"
        true, predicted = printable(each.true), printable(each.predicted)
        yield f"  {where}: {true}, predicted {predicted} ({percent(each.probability)})"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows as columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        others = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        yield f"  {first.ljust(widths[0])}  {'  '.join(others)}".rstrip()


def _short(name: str) -> str:
    text = printable(name)
    return text if len(text) <= MAX_WIDTH else f"{text[: MAX_WIDTH - 3]}..."
