"""Check a source of images before a study: what stops it, and what a user should look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.kinds.found import FoundImages
from drtune_ray.data.kinds.recognize import find_images
from drtune_ray.data.pictures import PictureFacts, picture_facts, similar_pairs, thumbnail
from drtune_ray.data.report import image_notes
from drtune_ray.data.sources import FILE_SCHEMA, BadImage, ScannedImages, read_found, unclear_floats
from drtune_ray.data.splits import SPLIT_COLUMN, TRAIN, VALIDATION, Splits, make_splits
from drtune_ray.errors import ConfigError
from drtune_ray.values import printable

ERROR, WARNING, NOTE = "error", "warning", "note"
# Bits of 64 in which the perceptual hashes of near duplicates differ at most.
NEAR_DISTANCE = 4
NUM_PICTURES = 12
Row = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """Something that a user should know.

    Attributes:
        level: `ERROR`, which stops a study, `WARNING`, or `NOTE` about how the source was read.
        text: A sentence.
        paths: Some of the pictures concerned.
    """

    level: str
    text: str
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceCheck:
    """What was found in a source.

    Attributes:
        location: The source.
        counts: Images by class and split; without splits where the source cannot be divided.
        facts: Numbers of images by size, mode, format.
        findings: Errors first.
        examples: Some pictures of each class.
        found: The source, for thumbnails.
    """

    location: str
    counts: dict[str, dict[str, int]]
    facts: dict[str, str]
    findings: tuple[Finding, ...]
    examples: dict[str, tuple[str, ...]]
    found: FoundImages

    @property
    def has_errors(self) -> bool:
        """Whether something stops a study."""
        return any(finding.level == ERROR for finding in self.findings)

    def thumbnail(self, path: str) -> str:
        """Return a picture as a data URI; empty if it cannot be shown."""
        try:
            return thumbnail(self.found.reader.read(path))
        except OSError:
            return ""


def check_source(config: DataConfig) -> SourceCheck:
    """Read every image of a source, and report errors and warnings.

    Raises:
        ConfigError: If the source cannot be listed at all.
    """
    found = find_images(config)
    errors = [Finding(ERROR, problem) for problem in found.problems]
    read = list(read_found(found))
    errors += [Finding(ERROR, r.problem, (r.path,)) for r in read if isinstance(r, BadImage)]
    rows = [row for row in read if not isinstance(row, BadImage)]
    files = pa.Table.from_pylist(rows, schema=FILE_SCHEMA)
    errors += [Finding(ERROR, problem) for problem in unclear_floats(found, files)]
    scanned = ScannedImages(
        found.location, found.classes, files, tuple(found.left_out), tuple(found.notes)
    )
    splits, warnings = _divided(scanned, config)
    if splits is None:
        errors += warnings
        warnings = []
    else:
        rows = splits.manifest.to_pylist()
    facts = _facts(found, rows)
    warnings += [*_near_duplicates(found.classes, rows, facts), *_turned(rows, facts)]
    return SourceCheck(
        found.location,
        _counts(found.classes, rows),
        _summary(facts),
        (*errors, *warnings),
        _examples(found.classes, rows),
        found,
    )


def _divided(scanned: ScannedImages, config: DataConfig) -> tuple[Splits | None, list[Finding]]:
    """Return the splits with what is said of them, or None and the problems."""
    try:
        splits = make_splits(scanned, config)
    except ConfigError as error:
        return None, [Finding(ERROR, problem) for problem in error.problems]
    notes = [Finding(NOTE, note) for note in splits.notes]
    warnings = image_notes(splits)[len(notes) + 1 :]  # behind the sizes of the classes
    return splits, [*notes, *(Finding(WARNING, text) for text in warnings)]


def _facts(found: FoundImages, rows: Sequence[Row]) -> list[PictureFacts]:
    def of(row: Row) -> PictureFacts:
        return picture_facts(found.reader.read(row["path"]))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(of, rows))


def _near_duplicates(
    classes: Sequence[str], rows: Sequence[Row], facts: Sequence[PictureFacts]
) -> Iterator[Finding]:
    """Yield findings about pictures that look alike across classes, and across splits."""
    usable = [at for at, row in enumerate(rows) if not row["is_uniform"]]
    hashes = np.array([facts[at].perceptual_hash for at in usable], np.uint64)
    pairs = [
        (rows[usable[a]], rows[usable[b]]) for a, b in similar_pairs(hashes, NEAR_DISTANCE).tolist()
    ]
    # Exact copies have findings of their own.
    pairs = [(a, b) for a, b in pairs if a["pixel_hash"] != b["pixel_hash"]]
    kinds = {
        "have different classes: one label may be wrong": "label",
        "are in different splits: a model that saw one of them knows the other": SPLIT_COLUMN,
    }
    for what, column in kinds.items():
        apart = [(a, b) for a, b in pairs if a.get(column) != b.get(column)]
        if apart:
            shown = [printable(row["path"]) for row in apart[0]]
            number = "1 pair" if len(apart) == 1 else f"{len(apart)} pairs"
            yield Finding(
                WARNING,
                f"{number} of pictures that look alike ({' ~ '.join(shown)}) {what}",
                tuple(row["path"] for pair in apart[: NUM_PICTURES // 2] for row in pair),
            )


def _turned(rows: Sequence[Row], facts: Sequence[PictureFacts]) -> Iterator[Finding]:
    """Yield findings about pictures that EXIF turns, and those with several frames."""
    kinds = {
        "turned upright by their EXIF orientation": [fact.is_turned for fact in facts],
        "animated or of several pages: the first one is used": [f.num_frames > 1 for f in facts],
    }
    for what, chosen in kinds.items():
        paths = [row["path"] for row, is_one in zip(rows, chosen, strict=True) if is_one]
        if paths:
            text = f"{len(paths)} of {len(rows)} pictures are {what} ({printable(paths[0])})"
            yield Finding(WARNING, text, tuple(paths[:NUM_PICTURES]))


def _counts(classes: Sequence[str], rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    found = Counter((row["label"], row.get(SPLIT_COLUMN, "images")) for row in rows)
    order = {TRAIN: 0, VALIDATION: 1}
    splits = sorted({split for _, split in found}, key=lambda split: order.get(split, 2))
    return {
        name: {split: found[label, split] for split in splits} for label, name in enumerate(classes)
    }


def _summary(facts: Sequence[PictureFacts]) -> dict[str, str]:
    if not facts:
        return {}
    sizes = sorted(((fact.width, fact.height) for fact in facts), key=lambda s: s[0] * s[1])
    shown = [f"{w}x{h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
    return {
        "smallest, median and largest size": ", ".join(shown),
        "modes": _counted(fact.mode for fact in facts),
        "formats": _counted(fact.form for fact in facts),
    }


def _counted(values: Iterator[str]) -> str:
    return ", ".join(f"{value} {number}" for value, number in Counter(values).most_common())


def _examples(classes: Sequence[str], rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    paths: dict[int, list[str]] = {label: [] for label in range(len(classes))}
    for row in sorted(rows, key=lambda row: str(row["content_hash"])):
        if len(paths[row["label"]]) < NUM_PICTURES:
            paths[row["label"]].append(row["path"])
    return {name: tuple(paths[label]) for label, name in enumerate(classes)}
