"""Train / validation / sealed test: stratified by quota, in the order of the content hash.

Nothing is drawn at random: an image's rank within its class follows from its content. Images that
were assigned before keep their split; later ones fill the quotas. Exact copies stay together, and
so do groups. Splits that a source gives are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.groups import fill_quotas, parted, units_of
from drtune_ray.data.kinds.found import FoundImages
from drtune_ray.data.listing import (
    OF_HELD_OUT,
    OF_TRAINING,
    OF_VALIDATION,
    LeftOut,
    is_named,
    others_of,
)
from drtune_ray.data.pixels import DEFAULT_WHITES, WhiteValues
from drtune_ray.data.sources import GIVEN_SPLIT, GROUP, ScannedImages, whites_of
from drtune_ray.data.subsets import fold_contents, share_mask
from drtune_ray.errors import ConfigError, EnvironmentProblem, first_line
from drtune_ray.folders import atomic_write
from drtune_ray.values import digest

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLIT_COLUMN = "split"
NUM_GROUPS_SHOWN = 5


@dataclass(frozen=True)
class Splits:
    """A scanned source with a split for each image.

    Attributes:
        manifest: Table of files with a column ``split`` (train, validation or test).
        classes: Class names in the order of the labels.
        left_out: Files of the source that are not used.
        notes: Sentences about how the source was read and divided.
    """

    manifest: pa.Table
    classes: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    def rows(self, split: str) -> pa.Table:
        """Return the manifest's rows of one split."""
        return self.manifest.filter(pa.compute.equal(self.manifest["split"], split))

    def count(self, split: str) -> int:
        """Return the number of images of one split."""
        return len(self.rows(split))

    @property
    def whites(self) -> WhiteValues:
        """Values that become white in images of more than 8 bits."""
        return whites_of(self.manifest)

    def content_digest(self, split: str | None = None) -> str:
        """Return a hash of content, label and split of the images, of one split or of all."""
        table = self.manifest if split is None else self.rows(split)
        columns = [table[name].to_pylist() for name in ("content_hash", "label", "split")]
        whites = self.whites
        scaling = [] if whites == DEFAULT_WHITES else [whites.integer, whites.floating]
        return digest(self.classes, sorted(zip(*columns, strict=True)), *scaling)


def read_manifest(path: Path) -> pa.Table | None:
    """Read a table of images and splits; return None if there is none.

    Raises:
        EnvironmentProblem: If it is damaged.
    """
    if not path.exists():
        return None
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        table.validate(full=True)
        _check_manifest(table)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise EnvironmentProblem(
            f"{path}, which holds the splits of the images, is damaged ({first_line(error)}): "
            "bring it back from a backup; a study's own copy is splits.parquet in its folder"
        ) from None
    return table


def write_manifest(manifest: pa.Table, path: Path) -> None:
    """Write the table of images and their splits, with checksums."""
    write = partial(pq.write_table, manifest, write_page_checksum=True)
    atomic_write(path, write)


def _check_manifest(table: pa.Table) -> None:
    """Raise ValueError for a table that holds no splits."""
    names = {"path", "label", "content_hash", SPLIT_COLUMN}
    if not names <= set(table.schema.names):
        raise ValueError("columns are missing")
    columns = (table[name] for name in names)
    if any(column.null_count for column in columns):
        raise ValueError("values are missing")
    if not set(table[SPLIT_COLUMN].to_pylist()) <= {TRAIN, VALIDATION, TEST}:
        raise ValueError("a split is unknown")


def make_splits(
    images: ScannedImages, config: DataConfig, former: pa.Table | None = None
) -> Splits:
    """Assign every image to a split.

    Splits that the source gives are kept; one that it lacks is cut from its training images. Copies
    of an image in several given splits count for the most protected one.

    Args:
        images: The scanned source.
        config: `validation_fraction`, `test_fraction` and `train_per_class`. With the last, a
            class has that many training images and the rest is divided between validation and
            test in proportion to the fractions. With `folds` the test split is the part `fold`.
            `train_share` leaves out the rest of the training images.
        former: Earlier manifest of the same source, whose assignments are kept.

    Raises:
        ConfigError: If a class has too few different images; every such class is named. Also with
            `folds`, if the source gives splits.
    """
    given, notes = _given_splits(images, config)
    parts = tuple(part for part in (TEST, VALIDATION) if part not in given.values())
    earlier = _earlier(former)
    assigned = {content: split for content, split in given.items() if split != TRAIN} or earlier
    if config.folds is not None:
        if given:
            raise ConfigError(
                f"data.folds={config.folds} cannot be used with images whose splits are given: "
                "leave it out, or give the images without their splits"
            )
        assigned = dict.fromkeys(fold_contents(images, config), TEST) | earlier
    if given:
        assigned |= {c: s for c, s in earlier.items() if given.get(c) == TRAIN and s in parts}
    hashes = images.files["content_hash"].to_pylist()
    if parts:
        _cut(images, hashes, config, parts, assigned)
    else:
        assigned = given
    groups = images.files[GROUP].to_pylist()
    if problems := [*_parted_groups(groups, hashes, assigned)]:
        raise ConfigError(problems)
    column = pa.array([assigned[h] for h in hashes], pa.string())
    manifest = images.files.append_column(SPLIT_COLUMN, column)
    if config.train_share < 1:
        manifest, note = _shared_training(manifest, config.train_share)
        notes.append(note)
    lacking = _lacking_classes(manifest, images.classes)
    if TRAIN in lacking:
        raise ConfigError(
            f"the given training images have none of class {lacking[TRAIN]}: add some, or remove "
            "the class from the other splits"
        )
    notes += _notes_on_lacking(lacking)
    return Splits(manifest, images.classes, images.left_out, (*images.notes, *notes))


def _shared_training(manifest: pa.Table, share: float) -> tuple[pa.Table, str]:
    """Return the table with a share of each class's training images, and a sentence about it."""
    contents, labels = (manifest[name].to_pylist() for name in ("content_hash", "label"))
    is_train = [split == TRAIN for split in manifest[SPLIT_COLUMN].to_pylist()]
    mask = share_mask(contents, labels, is_train, share)
    total = sum(is_train)
    note = f"data.train_share={share:g}: {total - mask.count(False)} of {total} training images"
    return manifest.filter(pa.array(mask)), note


def num_train_at_least(found: FoundImages, config: DataConfig) -> int:
    """Return a lower bound of the number of training images, before they are read."""
    given = [split_of_word(image.split) for image in found.images if image.split is not None]
    parts = [part for part in (TEST, VALIDATION) if part not in given]
    number, num_classes = len(found.images), len(found.classes)
    if len(parts) < 2:
        number = sum(split == TRAIN for split in given)
    if config.train_per_class is not None and parts:
        number = config.train_per_class * num_classes
    else:
        shares = {TEST: config.test_fraction, VALIDATION: config.validation_fraction}
        if config.folds is not None:
            shares[TEST] = 1 / config.folds
        share = sum(shares[part] for part in parts)
        number = int(number * (1.0 - share)) - len(parts) * num_classes
    if config.train_share == 1:
        return number
    return int(number * config.train_share) - num_classes


def split_of_word(word: str) -> str | None:
    """Return the split that a source calls by a word; None for an unknown word."""
    if is_named(word, OF_TRAINING):
        return TRAIN
    if is_named(word, OF_VALIDATION):
        return VALIDATION
    return TEST if is_named(word, OF_HELD_OUT) else None


def _earlier(former: pa.Table | None) -> dict[str, str]:
    if former is None:
        return {}
    columns = (former[name].to_pylist() for name in ("content_hash", SPLIT_COLUMN))
    return dict(zip(*columns, strict=True))


def _given_splits(images: ScannedImages, config: DataConfig) -> tuple[dict[str, str], list[str]]:
    """Return the splits that the source gives by content, empty for none, and sentences on them.

    Raises:
        ConfigError: If a word is no split, or some images have none.
    """
    words = images.files[GIVEN_SPLIT].to_pylist()
    if not any(words):
        return {}, []
    by_word = {word: split_of_word(word) for word in set(words) if word is not None}
    unknown = sorted(word for word, split in by_word.items() if split is None)
    if unknown or None in words:
        raise ConfigError(
            f"{images.location} gives an image the split {[*unknown, ''][0]!r}: write train, "
            "validation or test for every image, or name another data.split_column"
        )
    found: dict[str, set[str]] = defaultdict(set)
    for content, word in zip(images.files["content_hash"].to_pylist(), words, strict=True):
        found[content].add(by_word[word] or "")
    given = {
        c: next(s for s in (TEST, VALIDATION, TRAIN) if s in splits) for c, splits in found.items()
    }
    present = set(given.values())
    if present == {TRAIN}:
        return {}, []
    if TRAIN not in present:
        raise ConfigError(f"{images.location} has no training images among its splits: add some")
    if len(present) == 3 and config.train_per_class is not None:
        raise ConfigError(
            f"data.train_per_class={config.train_per_class} cannot be used with images whose "
            "splits are all given: leave it out"
        )
    return given, [*_notes_on_given(found, present)]


def _notes_on_given(found: dict[str, set[str]], present: set[str]) -> Iterator[str]:
    order = (TRAIN, VALIDATION, TEST)
    missing = [split for split in order if split not in present]
    kept = ", ".join(split for split in order if split in present)
    cut = f"; {missing[0]} is cut from the training images" if missing else ""
    yield f"given splits are kept: {kept}{cut}"
    if several := sum(len(splits) > 1 for splits in found.values()):
        pictures = "1 picture is" if several == 1 else f"{several} pictures are"
        yield (
            f"{pictures} in several given splits: each counts for test before validation before "
            "train, and so is not trained on"
        )


def _cut(
    images: ScannedImages,
    hashes: Sequence[str],
    config: DataConfig,
    parts: Sequence[str],
    assigned: dict[str, str],
) -> None:
    """Divide the images that no given split holds back between training and the parts.

    Raises:
        ConfigError: If a class has too few different images.
    """
    labels, groups = (images.files[name].to_pylist() for name in ("label", GROUP))
    held = {content for content, split in assigned.items() if split not in (TRAIN, *parts)}
    problems = []
    quotas: dict[int, dict[str, int]] = {}
    pools: list[set[str]] = [set() for _ in images.classes]
    for content, label in zip(hashes, labels, strict=True):
        if content not in held:
            pools[label].add(content)
    is_grouped = any(group is not None for group in groups)
    for label, name in enumerate(images.classes):
        problem = _too_few(name, len(pools[label]), config, parts, others_of(name, images.left_out))
        if problem is None:
            quotas[label] = _quotas(pools[label], config, parts, assigned)
            if not is_grouped:
                _fill_quotas(pools[label], quotas[label], assigned)
                found = {assigned[image] for image in pools[label]}
                problem = _empty_split(name, found, parts)
        if problem:
            problems.append(problem)
    if is_grouped and not problems:
        rows = [r for r in zip(hashes, labels, groups, strict=True) if r[0] not in held]
        problems += _cut_by_groups(images, rows, quotas, parts, assigned)
    if problems:
        raise ConfigError(problems)


def _cut_by_groups(
    images: ScannedImages,
    rows: Sequence[tuple[str, int, str | None]],
    quotas: Mapping[int, Mapping[str, int]],
    parts: Sequence[str],
    assigned: dict[str, str],
) -> Iterator[str]:
    """Assign whole groups, and yield a sentence for each class of which a split gets none."""
    units = units_of(*zip(*rows, strict=True))
    fill_quotas(units, quotas, (*parts, TRAIN), assigned)
    found: dict[int, set[str]] = defaultdict(set)
    for content, label, _ in rows:
        found[label].add(assigned[content])
    for label, name in enumerate(images.classes):
        missing = [split for split in (TRAIN, *reversed(parts)) if split not in found[label]]
        if missing:
            num_groups = sum(label in unit.labels for unit in units)
            yield (
                f"class {name!r} has no group left for {' and '.join(missing)}: its images are in "
                f"{num_groups} groups, and each split needs one; add images of other groups or "
                "leave out data.group_column"
            )


def _parted_groups(
    groups: Sequence[str | None], hashes: Sequence[str], assigned: Mapping[str, str]
) -> Iterator[str]:
    found = list(parted(groups, hashes, assigned))
    for group, splits in found[:NUM_GROUPS_SHOWN]:
        yield (
            f"group {group!r} is in {' and '.join(sorted(splits))}: give its images one split, or "
            "leave out data.group_column"
        )


def _lacking_classes(manifest: pa.Table, classes: Sequence[str]) -> dict[str, str]:
    """Return some names of classes without an image by the split that lacks them."""
    columns = (manifest[name].to_pylist() for name in ("label", SPLIT_COLUMN))
    there = set(zip(*columns, strict=True))
    lacking = {
        split: [name for label, name in enumerate(classes) if (label, split) not in there]
        for split in (TRAIN, VALIDATION, TEST)
    }
    return {s: ", ".join(map(repr, names[:5])) for s, names in lacking.items() if names}


def _notes_on_lacking(lacking: Mapping[str, str]) -> list[str]:
    return [f"{split} has no image of class {names}" for split, names in lacking.items()]


def _empty_split(name: str, found: set[str], parts: Sequence[str]) -> str | None:
    missing = [split for split in (TRAIN, *reversed(parts)) if split not in found]
    if not missing:
        return None
    return (
        f"class {name!r} has no image left for {' and '.join(missing)}: its images already belong "
        "to a split, by copies in other classes or by an earlier study under this storage; add "
        "images to the class or use another --storage"
    )


def _too_few(
    name: str, num_images: int, config: DataConfig, parts: Sequence[str], others: str
) -> str | None:
    num_train = config.train_per_class or 1
    needed = num_train + len(parts)
    if num_images >= needed:
        return None
    purposes = {VALIDATION: "validation", TEST: "test"}
    rest = "".join(f", 1 for {purposes[part]}" for part in reversed(parts))
    return (
        f"class {name!r} has {num_images} different images{others} but the splits need at least "
        f"{needed} ({num_train} for training{rest}): add images or remove the class"
    )


def _quotas(
    images: Set[str], config: DataConfig, parts: Sequence[str], assigned: Mapping[str, str]
) -> dict[str, int]:
    """Return the number of images of each split for a class with these images."""
    num_images = len(images)
    fractions = {TEST: config.test_fraction, VALIDATION: config.validation_fraction}
    if config.folds is not None:
        quota = {
            TEST: sum(assigned.get(image) == TEST for image in images),
            VALIDATION: max(1, round(num_images * config.validation_fraction)),
        }
    elif config.train_per_class is None:
        quota = {part: max(1, round(num_images * fractions[part])) for part in parts}
    else:
        rest = num_images - config.train_per_class
        share = config.test_fraction / (config.test_fraction + config.validation_fraction)
        test = min(max(1, round(rest * share)), rest - 1)
        quota = {TEST: test, VALIDATION: rest - test} if len(parts) == 2 else {parts[0]: rest}
    while num_images - sum(quota.values()) < 1:
        quota = {part: max(1, number - 1) for part, number in quota.items()}
    return quota | {TRAIN: num_images - sum(quota.values())}


def _fill_quotas(images: set[str], quotas: dict[str, int], assigned: dict[str, str]) -> None:
    """Assign the images of a class that have no split yet, in the order of the content hash.

    An image counts once however many copies it has; copies share its split.
    """
    room = dict(quotas)
    for image in images & assigned.keys():
        room[assigned[image]] -= 1
    for image in sorted(images - assigned.keys()):
        split = next((s for s, left in room.items() if left > 0 and s != TRAIN), TRAIN)
        assigned[image] = split
        room[split] -= 1
