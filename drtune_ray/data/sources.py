"""Scan a source of images into one Arrow table of images and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.files import LocalFiles
from drtune_ray.data.kinds.found import FoundImage, FoundImages, ImageReader
from drtune_ray.data.kinds.recognize import find_images
from drtune_ray.data.listing import DAMAGED, LeftOut, others_of
from drtune_ray.data.pixels import (
    UNCLEAR_PEAK,
    UndecodableImageError,
    WhiteValues,
    examine,
    white_values,
)
from drtune_ray.data.root import name_problems
from drtune_ray.errors import ConfigError
from drtune_ray.values import printable

NUM_PROBLEMS_SHOWN = 5
INTEGER_PEAK, FLOAT_PEAK = "integer_peak", "float_peak"
GIVEN_SPLIT, GROUP = "given_split", "group"
FILE_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.int32()),
        ("content_hash", pa.string()),
        ("num_bytes", pa.int64()),
        ("modified_ns", pa.int64()),
        (INTEGER_PEAK, pa.float64()),
        (FLOAT_PEAK, pa.float64()),
        ("is_uniform", pa.bool_()),
        ("pixel_hash", pa.string()),
        (GIVEN_SPLIT, pa.string()),
        (GROUP, pa.string()),
    ]
)
FACTS = ("content_hash", "num_bytes", INTEGER_PEAK, FLOAT_PEAK, "is_uniform", "pixel_hash")


@dataclass(frozen=True)
class ScannedImages:
    """A scanned source.

    Attributes:
        location: The source.
        classes: Class names in the order of the labels.
        files: Table of `FILE_SCHEMA`, in the order of the source.
        left_out: Files or rows that are not used.
        notes: Sentences about how the source was read.
    """

    location: str
    classes: tuple[str, ...]
    files: pa.Table
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used, and why."""

    path: str
    problem: str


def scan_images(config: DataConfig, known: pa.Table | None = None) -> ScannedImages:
    """List, hash and decode every image of a source.

    Args:
        config: The source, its columns, and whether bad images are left out.
        known: An earlier scan; images of the same path, size and time are not read again.

    Raises:
        ConfigError: If the source is missing or empty, has fewer than two classes or an empty
            class, or holds images that cannot be decoded; all problems are named together.
    """
    found = find_images(config)
    if found.problems:
        raise ConfigError(_first(found.problems))
    read = list(read_found(found, known))
    bad = [result for result in read if isinstance(result, BadImage)]
    if bad and not config.skip_bad:
        raise ConfigError(_first(result.problem for result in bad))
    left_out = [*found.left_out, *(LeftOut(printable(each.path), DAMAGED) for each in bad)]
    rows = [result for result in read if not isinstance(result, BadImage)]
    files = pa.Table.from_pylist(rows, schema=FILE_SCHEMA)
    if problems := [*_emptied_classes(found, files, left_out), *unclear_floats(found, files)]:
        raise ConfigError(problems)
    return ScannedImages(found.location, found.classes, files, tuple(left_out), tuple(found.notes))


def read_bytes(source: Path | ImageReader, row: dict[str, Any]) -> bytes:
    """Read the encoded image of a row of the table.

    Args:
        source: Reader of the images, or the folder of files.
        row: The row.

    Raises:
        ConfigError: If the image is missing or changed since the scan.
    """
    reader = LocalFiles(source) if isinstance(source, Path) else source
    path = str(row["path"])
    where = printable(reader.address(path))
    try:
        content = reader.read(path)
    except OSError as error:
        raise ConfigError(f"cannot read {where}: {error.strerror}; restore the file") from None
    if content_hash(content) != row["content_hash"]:
        raise ConfigError(f"{where} changed since the study started: restore the original file")
    return content


def content_hash(content: bytes) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def whites_of(files: pa.Table) -> WhiteValues:
    """Return the values that become white in the images of a scan.

    An earlier release's scan lacks the largest values: its images of more than 8 bits are read as
    that release read them.
    """
    columns = (
        files[name].to_pylist() if name in files.schema.names else []
        for name in (INTEGER_PEAK, FLOAT_PEAK)
    )
    return white_values(*columns)


def _emptied_classes(
    found: FoundImages, files: pa.Table, left_out: Iterable[LeftOut]
) -> Iterator[str]:
    """Yield a sentence for each class none of whose images can be decoded."""
    there = set(files["label"].to_pylist())
    noun = found.class_noun
    for label, name in enumerate(found.classes):
        if label not in there:
            yield (
                f"{noun} {name!r} in {found.location} holds no sound image"
                f"{others_of(name, left_out)}: add some or remove the {noun.split()[-1]}"
            )


# ---- images


def read_found(
    found: FoundImages, known: pa.Table | None = None
) -> Iterator[dict[str, Any] | BadImage]:
    """Yield a row of the table for each image that was found, or why it has none."""
    is_usable = known is not None and {*FACTS, "modified_ns"} <= set(known.schema.names)
    rows = known.to_pylist() if known is not None and is_usable else []
    earlier = {row["path"]: row for row in rows}
    labels = {name: label for label, name in enumerate(found.classes)}
    with ThreadPoolExecutor() as pool:
        yield from pool.map(partial(_read, found.reader, earlier, labels), found.images)


def _read(
    reader: ImageReader,
    earlier: dict[str, dict[str, Any]],
    labels: dict[str, int],
    image: FoundImage,
) -> dict[str, Any] | BadImage:
    where = reader.address(image.path)
    for problem in name_problems([Path(where)]):
        return BadImage(image.path, problem)
    try:
        stamp = reader.stamp(image.path)
        row = {
            "path": image.path,
            "label": labels[image.label],
            "modified_ns": stamp.modified_ns,
            GIVEN_SPLIT: image.split,
            GROUP: image.group,
        }
        before = earlier.get(image.path)
        if before and before["modified_ns"] == stamp.modified_ns:
            if stamp.num_bytes in (None, before["num_bytes"]):
                return {name: before[name] for name in FACTS} | row
        content = reader.read(image.path)
    except OSError as error:
        return BadImage(
            image.path,
            f"{printable(where)} cannot be read ({error.strerror}): replace or remove it, or set "
            "data.skip_bad=true",
        )
    try:
        facts = examine(content)
    except UndecodableImageError as error:
        return BadImage(
            image.path,
            f"{printable(where)} cannot be decoded as an image ({error}): replace or remove it, or "
            "set data.skip_bad=true",
        )
    return row | vars(facts) | {"content_hash": content_hash(content), "num_bytes": len(content)}


def unclear_floats(found: FoundImages, files: pa.Table) -> Iterator[str]:
    """Yield a sentence if the floating-point images have no known range of brightness."""
    peaks = {
        path: peak
        for path, peak in zip(files["path"].to_pylist(), files[FLOAT_PEAK].to_pylist(), strict=True)
        if peak is not None
    }
    if not peaks:
        return
    brightest = max(peaks, key=lambda path: peaks[path])
    small = [path for path, peak in peaks.items() if 0 < peak <= 1]
    top, where = peaks[brightest], printable(found.reader.address(brightest))
    if 1 < top <= UNCLEAR_PEAK:
        yield (
            f"{where} holds floating-point values up to {top:g}, which fit neither "
            "0 to 1 nor 0 to 255: rescale the floating-point images to 0 to 1"
        )
    elif top > UNCLEAR_PEAK and small:
        yield (
            f"{printable(found.reader.address(small[0]))} holds floating-point values up to "
            f"{peaks[small[0]]:g} and {where} up to {top:g}: rescale the floating-point images to "
            "one range"
        )


def _first(problems: Iterable[str]) -> list[str]:
    """Return the first problems and the number of the others."""
    problems = list(problems)
    more = len(problems) - NUM_PROBLEMS_SHOWN
    return problems[:NUM_PROBLEMS_SHOWN] + ([f"and {more} more such files"] if more > 0 else [])
