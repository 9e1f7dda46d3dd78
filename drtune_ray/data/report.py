"""What a user should know about a folder of images before a study trains on them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from drtune_ray.data.listing import NO_IMAGE, LeftOut, kinds_of
from drtune_ray.data.sources import FLOAT_PEAK, INTEGER_PEAK
from drtune_ray.data.splits import Splits
from drtune_ray.values import printable

NUM_CLASSES_SHOWN = 20
NUM_EXAMPLES = 3
# Largest class over smallest class from which the classes count as imbalanced.
IMBALANCE = 10


def image_notes(splits: Splits) -> tuple[str, ...]:
    """Return sentences about the images of a study: classes, files left out, what looks wrong."""
    rows = splits.manifest.to_pylist()
    labels = Counter(row["label"] for row in rows)
    sizes = {name: labels[label] for label, name in enumerate(splits.classes)}
    return (
        *splits.notes,
        _sizes(sizes),
        *_imbalance(sizes),
        *_left_out(splits.left_out),
        *_similar_names(splits.classes),
        *_in_several_classes(rows),
        *_uniform(rows),
        *_scaling(splits),
    )


def image_changes(former: pa.Table, present: pa.Table) -> list[str]:
    """Return how the images of a study differ from those it began with; empty if they are equal.

    Args:
        former: Manifest that the study began with.
        present: Manifest of its folder now.
    """
    before, now = _contents(former), _contents(present)
    common = before.keys() & now.keys()
    kinds = {
        "new": now.keys() - before.keys(),
        "missing": before.keys() - now.keys(),
        "changed": {path for path in common if before[path][0] != now[path][0]},
    }
    if not any(kinds.values()):
        kinds["in another split"] = {path for path in common if before[path] != now[path]}
    return [
        f"{_images(len(paths))} {what} ({_examples([printable(path) for path in sorted(paths)])})"
        for what, paths in kinds.items()
        if paths
    ]


def _contents(manifest: pa.Table) -> dict[str, tuple[str, str]]:
    """Return content and split of the images by path; a new class would change every label."""
    columns = (manifest[name].to_pylist() for name in ("path", "content_hash", "split"))
    return {path: (content, split) for path, content, split in zip(*columns, strict=True)}


def _images(number: int) -> str:
    return "1 image is" if number == 1 else f"{number} images are"


def _pictures(number: int) -> str:
    return "1 picture" if number == 1 else f"{number} pictures"


def _sizes(sizes: dict[str, int]) -> str:
    shown = [
        f"{printable(name)} {number}" for name, number in list(sizes.items())[:NUM_CLASSES_SHOWN]
    ]
    more = len(sizes) - len(shown)
    rest = f", and {more} more classes of {min(sizes.values())} to {max(sizes.values())} images"
    return f"images per class: {', '.join(shown)}{rest if more else ''}"


def _imbalance(sizes: dict[str, int]) -> Iterator[str]:
    smallest, largest = min(sizes, key=lambda n: sizes[n]), max(sizes, key=lambda n: sizes[n])
    if sizes[largest] >= IMBALANCE * sizes[smallest]:
        yield (
            f"the classes are imbalanced: {printable(largest)} has {sizes[largest]} images, "
            f"{printable(smallest)} {sizes[smallest]}; val_accuracy weighs each image alike, the "
            "objective worst_class_accuracy shows the weakest class"
        )


def _left_out(left_out: Sequence[LeftOut]) -> Iterator[str]:
    if not left_out:
        return
    by_reason: dict[str, list[LeftOut]] = defaultdict(list)
    for item in left_out:
        by_reason[item.reason].append(item)
    parts = [
        f"{_number(items)} {reason} ({_details(reason, items)})"
        for reason, items in sorted(by_reason.items())
    ]
    total = _number(left_out)
    yield f"{total} {'file' if total == 1 else 'files'} left out: {'; '.join(parts)}"


def _number(items: Iterable[LeftOut]) -> int:
    return sum(item.num_files for item in items)


def _details(reason: str, items: Sequence[LeftOut]) -> str:
    if reason == NO_IMAGE:
        return kinds_of(items)
    return _examples([item.path for item in items])


def _similar_names(classes: Sequence[str]) -> Iterator[str]:
    """Yield a sentence about names that differ in case or spaces only; single letters may."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike["".join(name.split()).casefold()].append(name)
    for names in alike.values():
        if len(names) > 1 and len(names[0]) > 1:
            yield (
                f"the classes {' and '.join(map(repr, names))} differ in case or spaces only: "
                "correct the labels if they are one class"
            )


def _in_several_classes(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    copies: dict[str, dict[int, str]] = defaultdict(dict)
    for row in rows:
        copies[row["pixel_hash"] or row["content_hash"]].setdefault(
            row["label"], printable(row["path"])
        )
    several = [" = ".join(paths.values()) for paths in copies.values() if len(paths) > 1]
    if several:
        verb = "lies" if len(several) == 1 else "lie"
        yield (
            f"{_pictures(len(several))} {verb} in several classes ({_examples(several)}): each "
            "counts as an image of every one of them; remove the wrong copies"
        )


def _uniform(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    paths = [printable(row["path"]) for row in rows if row.get("is_uniform")]
    if paths:
        verb = "has" if len(paths) == 1 else "have"
        yield f"{_pictures(len(paths))} {verb} one value in all pixels ({_examples(paths)})"


def _scaling(splits: Splits) -> Iterator[str]:
    files, whites = splits.manifest, splits.whites
    kinds = (
        (INTEGER_PEAK, "more than 8 bits", whites.integer),
        (FLOAT_PEAK, "floating-point values", whites.floating),
    )
    for column, what, white in kinds:
        number = sum(peak is not None for peak in files[column].to_pylist())
        if number:
            yield f"{_pictures(number)} of {what}: 0 becomes black and {white} becomes white"


def _examples(texts: Sequence[str]) -> str:
    more = ", ..." if len(texts) > NUM_EXAMPLES else ""
    return ", ".join(texts[:NUM_EXAMPLES]) + more
