"""Train / validation / sealed test: stratified by quota, in the order of the content hash.

Nothing is drawn at random: an image's rank within its class follows from its content. Images that
were assigned before keep their split; later ones fill the quotas. Exact copies stay together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from drtune_ray.config.trial import DataConfig
from drtune_ray.data.listing import LeftOut, others_of
from drtune_ray.data.pixels import DEFAULT_WHITES, WhiteValues
from drtune_ray.data.sources import ImageFolder, whites_of
from drtune_ray.errors import ConfigError, EnvironmentProblem, first_line
from drtune_ray.folders import atomic_write
from drtune_ray.values import digest

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLIT_COLUMN = "split"


@dataclass(frozen=True)
class Splits:
    """A scanned source with a split for each image.

    Attributes:
        manifest: Table of files with a column ``split`` (train, validation or test).
        classes: Class names in the order of the labels.
        left_out: Files of the source that are not used.
    """

    manifest: pa.Table
    classes: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

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
    atomic_write(path, write, is_durable=False)


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


def make_splits(folder: ImageFolder, config: DataConfig, former: pa.Table | None = None) -> Splits:
    """Assign every image to a split.

    Args:
        folder: The scanned source.
        config: `validation_fraction`, `test_fraction` and `train_per_class`. With the last, a
            class has that many training images and the rest is divided between validation and
            test in proportion to the fractions.
        former: Earlier manifest of the same source, whose assignments are kept.

    Raises:
        ConfigError: If a class has too few different images; every such class is named.
    """
    assigned = (
        {}
        if former is None
        else dict(zip(former["content_hash"].to_pylist(), former["split"].to_pylist(), strict=True))
    )
    hashes = folder.files["content_hash"].to_pylist()
    labels = folder.files["label"].to_pylist()
    problems = []
    for label, name in enumerate(folder.classes):
        images = {h for h, own in zip(hashes, labels, strict=True) if own == label}
        problem = _too_few(name, len(images), config, others_of(name, folder.left_out))
        if problem is None:
            _fill_quotas(images, _quotas(len(images), config), assigned)
            problem = _empty_split(name, {assigned[image] for image in images})
        if problem:
            problems.append(problem)
    if problems:
        raise ConfigError(problems)
    column = pa.array([assigned[h] for h in hashes], pa.string())
    manifest = folder.files.append_column("split", column)
    return Splits(manifest, folder.classes, folder.left_out)


def _empty_split(name: str, found: set[str]) -> str | None:
    missing = [split for split in (TRAIN, VALIDATION, TEST) if split not in found]
    if not missing:
        return None
    return (
        f"class {name!r} has no image left for {' and '.join(missing)}: its images already belong "
        "to a split, by copies in other classes or by an earlier study under this storage; add "
        "images to the class or use another --storage"
    )


def _too_few(name: str, num_images: int, config: DataConfig, others: str) -> str | None:
    needed = (config.train_per_class or 1) + 2
    if num_images >= needed:
        return None
    return (
        f"class {name!r} has {num_images} different images{others} but the splits need at least "
        f"{needed} ({needed - 2} for training, 1 for validation, 1 for test): add images or remove "
        "the class"
    )


def _quotas(num_images: int, config: DataConfig) -> dict[str, int]:
    if config.train_per_class is None:
        test = max(1, round(num_images * config.test_fraction))
        validation = max(1, round(num_images * config.validation_fraction))
    else:
        rest = num_images - config.train_per_class
        share = config.test_fraction / (config.test_fraction + config.validation_fraction)
        test = min(max(1, round(rest * share)), rest - 1)
        validation = rest - test
    while num_images - test - validation < 1:
        test, validation = max(1, test - 1), max(1, validation - 1)
    return {TEST: test, VALIDATION: validation, TRAIN: num_images - test - validation}


def _fill_quotas(images: set[str], quotas: dict[str, int], assigned: dict[str, str]) -> None:
    """Assign the images of a class that have no split yet, in the order of the content hash.

    An image counts once however many copies it has; copies share its split.
    """
    room = dict(quotas)
    for image in images & assigned.keys():
        room[assigned[image]] -= 1
    for image in sorted(images - assigned.keys()):
        split = next((s for s in (TEST, VALIDATION) if room[s] > 0), TRAIN)
        assigned[image] = split
        room[split] -= 1
