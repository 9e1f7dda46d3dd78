"""Rows of a list or table as images: which column holds what, and what a label means."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.kinds.found import FoundImage, FoundImages, ImageReader
from drtune_ray.data.listing import UNLABELLED, LeftOut
from drtune_ray.errors import ConfigError
from drtune_ray.values import printable

# Names that columns usually have, the most telling first; compared in lower case.
IMAGE_NAMES = (
    "image",
    "img",
    "file_name",
    "filename",
    "file",
    "image_path",
    "filepath",
    "file_path",
    "path",
    "image_id",
)
LABEL_NAMES = ("label", "class", "class_name", "category", "target", "species", "y", "labels")
SPLIT_NAMES = ("split", "subset", "partition")
NUM_SHOWN = 8


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a source; None where it has none."""

    image: str
    label: str
    split: str | None
    group: str | None

    def describe(self) -> str:
        """Return the columns as a phrase."""
        found = {"images": self.image, "labels": self.label}
        found |= {"splits": self.split, "groups": self.group}  # type: ignore[dict-item]
        return ", ".join(f"{what} from {name!r}" for what, name in found.items() if name)


@dataclass(frozen=True)
class Row:
    """A row of a list or table, or a sample of a tar shard.

    Attributes:
        path: Place of the image, by which the reader finds it.
        place: Place of the row, for messages.
        label: Value of the label column.
        split: Value of the split column, or the word of the file's name.
        group: Value of the group column.
    """

    path: str
    place: str
    label: Any
    split: Any = None
    group: Any = None


def choose_columns(
    names: Sequence[str],
    config: DataConfig,
    place: str,
    images: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Columns:
    """Return the columns of a source: those of the settings, otherwise by name and type.

    Args:
        names: Names of all columns.
        config: Settings, of which `image_column` and the like overrule.
        place: Place of the columns, for messages.
        images: Columns that hold images by their type.
        labels: Columns that hold classes by their type.

    Raises:
        ConfigError: If a column does not exist, or none or several could hold images or labels.
    """
    settings = {
        "data.image_column": config.image_column,
        "data.label_column": config.label_column,
        "data.split_column": config.split_column,
        "data.group_column": config.group_column,
    }
    problems = [
        f"{setting}={value!r} is not among the columns of {place}: {_listed(names)}"
        for setting, value in settings.items()
        if value is not None and value not in names
    ]
    image = config.image_column or _one(images) or _named(names, IMAGE_NAMES)
    label = config.label_column or _one(labels) or _named(names, LABEL_NAMES)
    for setting, chosen in {"data.image_column": image, "data.label_column": label}.items():
        if chosen is None:
            problems.append(
                f"which column of {place} to read is unclear: set {setting} to one of "
                f"{_listed(names)}"
            )
    if problems:
        raise ConfigError(problems)
    assert image is not None and label is not None
    split = config.split_column or _named(names, SPLIT_NAMES)
    return Columns(image, label, split, config.group_column)


def found_rows(
    location: str,
    reader: ImageReader,
    rows: Sequence[Row],
    label_column: str,
    *,
    names: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> FoundImages:
    """Return the images of rows, with their classes.

    Args:
        location: The source.
        reader: Reads the images.
        rows: All rows.
        label_column: Name of the label column, for messages.
        names: Names of the classes where the labels are their numbers.
        skip_bad: Leave out rows without a label, instead of refusing them.

    Raises:
        ConfigError: If the labels are no classes.
    """
    _check_kind_of_labels([row.label for row in rows], label_column, location)
    found = FoundImages(location, reader)
    images, unlabelled = [], []
    for row in rows:
        label = _label(row.label, names)
        if label is None:
            unlabelled.append(row)
        else:
            images.append(FoundImage(row.path, label, _word(row.split), _word(row.group)))
    found.images = images
    found.classes = class_order({image.label for image in images}, names)
    if unlabelled and skip_bad:
        found.left_out = [LeftOut(printable(row.place), UNLABELLED) for row in unlabelled]
    elif unlabelled:
        found.problems.append(
            f"{printable(unlabelled[0].place)} has no label"
            + f" (column {label_column!r}; {len(unlabelled)} without): add it, or set "
            "data.skip_bad=true"
        )
    if len(found.classes) < 2:
        found.problems.append(
            f"at least 2 classes must be in column {label_column!r} of {location}, but it holds "
            f"{', '.join(map(repr, found.classes)) or 'none'}: set data.label_column to another one"
        )
    found.notes += _unused_names(found.classes, names)
    return found


def _unused_names(classes: Sequence[str], names: Sequence[str] | None) -> list[str]:
    unused = len(set(names or ()) - set(classes))
    return [f"{unused} class names have no image and are left out"] if unused else []


def class_order(labels: Iterable[str], names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return classes in the order of their given names, otherwise by number or alphabet."""
    there = set(labels)
    if names is not None:
        return tuple(name for name in dict.fromkeys(names) if name in there)
    if all(re.fullmatch(r"-?\d{1,18}", label) for label in there):
        return tuple(sorted(there, key=lambda label: (int(label), label)))
    return tuple(sorted(there))


def several_splits(words: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the split of each file by its name, None for all where they name fewer than two."""
    given = {word for word in words.values() if word is not None}
    return dict(words) if len(given) > 1 else dict.fromkeys(words)


def _check_kind_of_labels(labels: Sequence[Any], column: str, location: str) -> None:
    lists = next((label for label in labels if isinstance(label, (list, tuple, dict))), None)
    if lists is not None:
        raise ConfigError(
            f"column {column!r} of {location} holds several labels an image, such as {lists!r}, "
            "and multi-label images are not supported: the feature bank and the class-level "
            "translation of DR-Tune need one class an image (docs/images.md)"
        )
    if (number := _fraction_among(labels)) is not None:
        raise ConfigError(
            f"column {column!r} of {location} holds numbers such as {number!r}, which are no "
            "classes, and regression is not supported: set data.label_column to a column of classes"
        )


def _fraction_among(labels: Sequence[Any]) -> Any:
    """Return a label that is a number with a fraction where all of them are numbers."""
    found = None
    for label in labels:
        if label is None or label == "":
            continue
        try:
            number = float(label)
        except (TypeError, ValueError):
            return None
        if math.isfinite(number) and number != int(number):
            found = label
    return found


def _label(value: Any, names: Sequence[str] | None) -> str | None:
    """Return the name of a class; None for none."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return str(value)


def _word(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _one(names: Sequence[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _named(names: Sequence[str], usual: Iterable[str]) -> str | None:
    by_lower: dict[str, str] = {}
    for name in names:
        by_lower.setdefault(name.lower().strip(), name)
    return next((by_lower[name] for name in usual if name in by_lower), None)


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NUM_SHOWN else ""
    return ", ".join(map(repr, names[:NUM_SHOWN])) + more
