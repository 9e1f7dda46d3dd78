"""Scan a folder of class folders into one Arrow table of files and labels."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from drtune_ray.data.listing import (
    DAMAGED,
    LeftOut,
    Listing,
    folders_in,
    list_class_folders,
    others_of,
)
from drtune_ray.data.pixels import (
    UNCLEAR_PEAK,
    UndecodableImageError,
    WhiteValues,
    examine,
    white_values,
)
from drtune_ray.data.root import check_root, name_problems
from drtune_ray.errors import ConfigError
from drtune_ray.values import printable

NUM_PROBLEMS_SHOWN = 5
INTEGER_PEAK, FLOAT_PEAK = "integer_peak", "float_peak"
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
    ]
)


@dataclass(frozen=True)
class ImageFolder:
    """A scanned source.

    Attributes:
        root: The folder.
        classes: Class names in the order of the labels.
        files: Table of `FILE_SCHEMA`, paths relative to the root; sorted by path.
        left_out: Files that are not used.
    """

    root: Path
    classes: tuple[str, ...]
    files: pa.Table
    left_out: tuple[LeftOut, ...] = ()


def scan_class_folders(
    root: Path, known: pa.Table | None = None, *, skip_bad: bool = False
) -> ImageFolder:
    """List, hash and decode every image of a folder of class folders.

    Args:
        root: Folder with one folder per class, whose images may be nested.
        known: An earlier scan; files of the same path, size and time are not read again.
        skip_bad: Leave out images that cannot be read or decoded, instead of refusing them.

    Raises:
        ConfigError: If the folder is missing or empty, holds splits, has fewer than two classes or
            an empty class, or holds images that cannot be decoded; all problems are named together.
    """
    check_root(root)
    listing = list_class_folders(root)
    names = name_problems(root / name for name in listing.images)
    if problems := [*listing.problems, *names]:
        raise ConfigError(_first(problems))
    if problems := [*_split_problems(listing), *_class_problems(listing)]:
        raise ConfigError(problems)
    work = [(path, label) for label, found in enumerate(listing.images.values()) for path in found]
    found = list(_read_files(root, work, known))
    bad = [result for result in found if isinstance(result, _BadFile)]
    if bad and not skip_bad:
        raise ConfigError(_first(result.problem for result in bad))
    for result in bad:
        listing.leave_out(result.path, DAMAGED)
    rows = [result for result in found if not isinstance(result, _BadFile)]
    files = pa.Table.from_pylist(rows, schema=FILE_SCHEMA)
    if problems := [*_emptied_classes(listing, files), *_unclear_floats(root, files)]:
        raise ConfigError(problems)
    return ImageFolder(root, tuple(listing.images), files, tuple(listing.left_out))


def read_bytes(root: Path, row: dict[str, object]) -> bytes:
    """Read the encoded image of a row of the table.

    Raises:
        ConfigError: If the file is missing or changed since the scan.
    """
    path = root / str(row["path"])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; restore the file") from None
    if content_hash(content) != row["content_hash"]:
        raise ConfigError(f"{path} changed since the study started: restore the original file")
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


# ---- folders


def _split_problems(listing: Listing) -> Iterator[str]:
    """Yield a sentence if the folder holds splits, each of which would count as a class."""
    names = listing.split_folders
    if not names:
        return
    folder = listing.root / names[0]
    classes = folders_in(folder)
    fix = f"give --data {folder}, which is split anew, or " if len(classes) > 1 else ""
    yield (
        f"data.train={str(listing.root)!r} holds the splits {', '.join(names)} instead of classes: "
        f"{fix}put the images of each class into one folder"
    )


def _class_problems(listing: Listing) -> Iterator[str]:
    names, root = list(listing.images), listing.root
    if len(names) < 2:
        yield (
            f"at least 2 class folders must be in data.train, but {root} holds {len(names)}"
            + (f" ({names[0]!r})" if names else "")
            + ": put the images of each class into a folder named after the class"
            + _nested_classes(root, names)
        )
    for name, found in listing.images.items():
        if not found:
            yield (
                f"class folder {printable(name)!r} in {root} holds no image that Pillow recognises"
                f"{others_of(name, listing.left_out)}: add some or remove the folder"
            )


def _nested_classes(root: Path, names: list[str]) -> str:
    below = folders_in(root / names[0]) if names else []
    return f", or give --data {root / names[0]}" if len(below) > 1 else ""


def _emptied_classes(listing: Listing, files: pa.Table) -> Iterator[str]:
    """Yield a sentence for each class none of whose images can be decoded."""
    there = set(files["label"].to_pylist())
    for label, name in enumerate(listing.images):
        if label not in there:
            yield (
                f"class folder {name!r} in {listing.root} holds no sound image"
                f"{others_of(name, listing.left_out)}: add some or remove the folder"
            )


# ---- files


@dataclass(frozen=True)
class _BadFile:
    """An image that cannot be used, and why."""

    path: Path
    problem: str


def _read_files(
    root: Path, work: list[tuple[Path, int]], known: pa.Table | None
) -> Iterator[dict[str, Any] | _BadFile]:
    is_usable = known is not None and set(FILE_SCHEMA.names) <= set(known.schema.names)
    rows = known.to_pylist() if known is not None and is_usable else []
    earlier = {row["path"]: row for row in rows}
    with ThreadPoolExecutor() as pool:
        yield from pool.map(partial(_read, root, earlier), work)


def _read(
    root: Path, earlier: dict[str, dict[str, Any]], item: tuple[Path, int]
) -> dict[str, Any] | _BadFile:
    path, label = item
    for problem in name_problems([path]):
        return _BadFile(path, problem)
    try:
        row = _row(root, path, label)
        before = earlier.get(row["path"])
        if before and all(before[key] == row[key] for key in ("num_bytes", "modified_ns")):
            return {name: before[name] for name in FILE_SCHEMA.names} | row
        content = path.read_bytes()
    except OSError as error:
        return _BadFile(
            path,
            f"{printable(path)} cannot be read ({error.strerror}): replace or remove it, or set "
            "data.skip_bad=true",
        )
    try:
        facts = examine(content)
    except UndecodableImageError as error:
        return _BadFile(
            path,
            f"{printable(path)} cannot be decoded as an image ({error}): replace or remove it, or "
            "set data.skip_bad=true",
        )
    return row | vars(facts) | {"content_hash": content_hash(content)}


def _row(root: Path, path: Path, label: int) -> dict[str, Any]:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for a writer
        raise OSError(0, "not a regular file")
    return {
        "path": path.relative_to(root).as_posix(),
        "label": label,
        "num_bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }


def _unclear_floats(root: Path, files: pa.Table) -> Iterator[str]:
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
    top = peaks[brightest]
    if 1 < top <= UNCLEAR_PEAK:
        yield (
            f"{printable(root / brightest)} holds floating-point values up to {top:g}, which fit "
            "neither 0 to 1 nor 0 to 255: rescale the floating-point images to 0 to 1"
        )
    elif top > UNCLEAR_PEAK and small:
        yield (
            f"{printable(root / small[0])} holds floating-point values up to {peaks[small[0]]:g} "
            f"and {printable(root / brightest)} up to {top:g}: rescale the floating-point images "
            "to one range"
        )


def _first(problems: Iterable[str]) -> list[str]:
    """Return the first problems and the number of the others."""
    problems = list(problems)
    more = len(problems) - NUM_PROBLEMS_SHOWN
    return problems[:NUM_PROBLEMS_SHOWN] + ([f"and {more} more such files"] if more > 0 else [])
