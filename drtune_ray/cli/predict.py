"""The command that uses a trained model: parse, call one function, print."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from drtune_ray.cli.options import echo, storage_option
from drtune_ray.errors import ConfigError

if TYPE_CHECKING:
    from drtune_ray.results.labelled import Measured
    from drtune_ray.results.predict import Model, Prediction, Unreadable

FORMATS = ("csv", "jsonl", "parquet")


@click.command()
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@storage_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write; its suffix (.csv, .jsonl, .parquet) sets the format. Default: stdout.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="Format of the predictions. Default: that of the suffix, or csv.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of the most probable classes to list for each image.",
)
@click.option(
    "--probabilities", "all_classes", is_flag=True, help="Add the probability of each class."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Number of images that go through the model at a time.",
)
@click.option(
    "--tracking-uri",
    metavar="URI",
    help="MLflow server or database of a MODEL models:/NAME@ALIAS. Default: MLFLOW_TRACKING_URI, "
    "else the database under the storage.",
)
@click.option("--device", help="Device such as cpu or cuda:1. Default: a GPU where there is one.")
def predict(
    model: str,
    images: tuple[str, ...],
    storage: str,
    output: Path | None,
    kind: str | None,
    top: int,
    all_classes: bool,
    batch_size: int,
    tracking_uri: str | None,
    device: str | None,
) -> None:
    """Classify images with a trained model.

    MODEL is the name of a study or training, its folder, a model's folder (winner), a file that
    export wrote, or MLflow's URI (models:/NAME@champion). IMAGES are files, folders with all images
    below them, patterns in quotes, or - for a list on standard input.

    Images that cannot be read are listed on stderr, and the exit code is then 2; the others are
    classified. Of folders whose class folders are the model's classes, metrics follow on stderr.
    """
    kind = _format(kind, output)
    from drtune_ray.results.predict import load  # only now: it imports torch

    loaded = load(
        model, storage=storage, tracking_uri=tracking_uri, device=device, batch_size=batch_size
    )
    top = min(top, len(loaded.classes))
    unreadable: list[Unreadable] = []
    measured = _measured(loaded, images)
    with _sink(output, kind) as sink:
        predictions = measured.watched(_predictions(loaded, images, unreadable))
        _write(sink, kind, predictions, loaded, top, all_classes)
    _show(measured)
    if unreadable:
        raise ConfigError(f"{each.image}: {each.reason}" for each in unreadable)


def _measured(model: Model, images: tuple[str, ...]) -> Measured:
    from drtune_ray.results.evaluate import images_of
    from drtune_ray.results.labelled import Measured, labels_below

    labels = labels_below(images, model.classes)
    used = images_of(model.folder.parent) if labels and model.folder else None
    return Measured(labels, model.classes, used)


def _show(measured: Measured) -> None:
    """Print the metrics of the labelled images on stderr: stdout holds the predictions."""
    from drtune_ray.display.tables import measured_lines

    echo(measured_lines(measured), err=True)


def _format(kind: str | None, output: Path | None) -> str:
    """Return the format of the predictions.

    Raises:
        ConfigError: If the suffix names no format, or Parquet has no file.
    """
    from drtune_ray.display.predictions import CSV, PARQUET, SUFFIXES

    by_suffix = CSV if output is None else SUFFIXES.get(output.suffix.lower())
    if kind is None and by_suffix is None:
        raise ConfigError(
            f"--output {output}: the suffix {output.suffix if output else ''!r} names no format; "
            f"use one of {', '.join(SUFFIXES)}, or give --format"
        )
    kind = kind or by_suffix or CSV
    if kind == PARQUET and output is None:
        raise ConfigError("--format parquet needs --output FILE: it is not text")
    return kind


@contextmanager
def _sink(output: Path | None, kind: str) -> Iterator[IO[Any]]:
    """Open what receives the predictions; a file appears when it is whole.

    Raises:
        ConfigError: If the file cannot be written.
    """
    if output is None:
        yield sys.stdout
        return
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        opened: IO[Any] = temporary.open("wb" if kind == "parquet" else "w")
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be written ({error.strerror}): give another file"
        ) from None
    try:
        with opened as sink:
            yield sink
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _predictions(
    model: Model, images: tuple[str, ...], unreadable: list[Unreadable]
) -> Iterator[Prediction]:
    """Yield the predictions, with a bar on a terminal; collect the images that have none."""
    from drtune_ray.data.image_files import image_files
    from drtune_ray.results.predict import Unreadable

    paths = list(image_files(images, sys.stdin))
    is_shown = sys.stderr.isatty() and not sys.stdout.isatty()
    with click.progressbar(
        model.stream(paths), length=len(paths), file=sys.stderr, hidden=not is_shown
    ) as found:
        for each in found:
            if isinstance(each, Unreadable):
                unreadable.append(each)
            else:
                yield each


def _write(
    sink: IO[Any],
    kind: str,
    predictions: Iterator[Prediction],
    model: Model,
    top: int,
    all_classes: bool,
) -> None:
    from drtune_ray.display.predictions import WRITERS, columns, row

    classes = model.classes
    rows = (row(each, classes, top, all_classes=all_classes) for each in predictions)
    WRITERS[kind](sink, rows, columns(classes, top, all_classes=all_classes))
