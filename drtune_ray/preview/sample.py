"""What preparing a study's tables takes: measured on some of its images, and sizes of them all."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.data.splits import TRAIN, VALIDATION, Splits
from drtune_ray.data.table_store import CACHE_FOLDER, TableStore
from drtune_ray.data.views import ViewMaker
from drtune_ray.study.inputs import StudyInputs
from drtune_ray.study.tables import backbone_name, build_tables, images_name
from drtune_ray.training.frozen_features import table_names, table_sizes

NUM_TRAIN, NUM_VALIDATION = 256, 256
NUM_VIEW_ROWS = 1024  # images in views of the sample, about: so many need the frozen encoder
NUM_BATCHES = 4
IMAGES, BACKBONE, VIEWS, EVALUATION, FEATURES = (
    "images",
    "backbone",
    "views",
    "evaluation",
    "features",
)


@dataclass(frozen=True)
class PlannedTable:
    """A table that a study reads.

    Attributes:
        name: Its file.
        kind: `IMAGES` and so on.
        num_bytes: Its size.
        num_rows: Images, or images in views.
        image_size: Side of the images in pixels.
        exists: Whether it was prepared before.
    """

    name: str
    kind: str
    num_bytes: int
    num_rows: int
    image_size: int
    exists: bool


def planned_tables(
    checked: StudyInputs, configs: Iterable[TrialConfig], storage: Path, device: str
) -> tuple[PlannedTable, ...]:
    """The tables of trials of several kinds, each once; pixels only where they have room.

    Args:
        checked: The images and encoders.
        configs: In the order in which their tables are prepared.
        storage: Where they would lie.
        device: Where the frozen encoder runs.
    """
    splits, cache = checked.splits, storage / CACHE_FOLDER
    num_train, num_validation = splits.count(TRAIN), splits.count(VALIDATION)
    planned: dict[str, PlannedTable] = {}

    def plan(name: str, kind: str, num_bytes: int, num_rows: int, side: int) -> None:
        is_there = (cache / name).exists()
        planned.setdefault(name, PlannedTable(name, kind, num_bytes, num_rows, side, is_there))

    for config in configs:
        data, backbone = config.data, checked.encoder_of(config)
        side = data.image_size
        images, weights = images_name(splits), backbone_name(backbone)
        num_images = num_train + num_validation
        plan(images, IMAGES, _image_bytes(splits), num_images, side)
        plan(weights, BACKBONE, backbone.num_bytes, 1, side)
        maker = ViewMaker(data, backbone.normalization.interpolation)
        names = table_names(data, maker, images, weights, device)
        sizes = table_sizes(data, num_train, num_validation, backbone.num_features, names)
        used = sum(table.num_bytes for table in planned.values())
        more = sum(size for name, size in sizes.items() if name not in planned)
        if used + more <= data.cache_limit_gib * 2**30:
            plan(names.evaluation, EVALUATION, sizes[names.evaluation], num_validation, side)
            if data.views:
                plan(names.views, VIEWS, sizes[names.views], num_train * data.views, side)
        if data.views:
            plan(names.features, FEATURES, sizes[names.features], num_train * data.views, side)
    return tuple(planned.values())


@dataclass(frozen=True)
class Sample:
    """Some of the images, prepared.

    Attributes:
        config: The trial that reads them.
        tables: Where they lie.
        num_train: Training images of the sample.
        num_validation: Validation images of the sample.
        row_seconds: Of a row of each kind of tables.
    """

    config: TrialConfig
    tables: Tables
    num_train: int
    num_validation: int
    row_seconds: dict[str, float]

    def seconds(self, tables: Iterable[PlannedTable]) -> float:
        """What preparing tables takes that are not there yet; other sizes by their pixels."""
        own = self.config.data.image_size
        return sum(
            self.row_seconds.get(table.kind, 0.0) * table.num_rows * (table.image_size / own) ** 2
            for table in tables
            if not table.exists
        )


def prepared_sample(
    checked: StudyInputs,
    configs: Sequence[TrialConfig],
    folder: Path,
    device: str,
    *,
    with_pixels: bool,
) -> Sample:
    """Prepare some of the images as a study prepares all of them, and see how long it takes.

    Args:
        checked: All images, and the encoders.
        configs: The trials to be measured on them, the base first; they read the same tables.
        folder: Takes the tables.
        device: Where the frozen encoder runs.
        with_pixels: Whether the study's own tables hold the pixels of the views.
    """
    bank_size, size = max(c.method.bank_size for c in configs), configs[0].training.batch_size
    num_batches = max(NUM_BATCHES, -(-max(NUM_TRAIN, bank_size) // size))
    splits = _some_of(checked.splits, num_batches * size)
    num_train, num_validation = splits.count(TRAIN), splits.count(VALIDATION)
    num_views = min(configs[0].data.views, max(1, NUM_VIEW_ROWS // num_train))
    config = configs[0].with_values({"data.views": num_views})
    limit_gib = float("inf") if with_pixels else 0.0
    with _TimedStore(folder, limit_gib) as store:
        tables = build_tables(replace(checked, splits=splits), config, store, device)
    num_rows = {
        IMAGES: num_train + num_validation,
        BACKBONE: 1,
        VIEWS: num_train * num_views,
        EVALUATION: num_validation,
        FEATURES: num_train * num_views,
    }
    row_seconds = {kind: spent / num_rows[kind] for kind, spent in store.seconds.items()}
    return Sample(config, tables, num_train, num_validation, row_seconds)


class _TimedStore(TableStore):
    """A store that keeps how long each kind of tables took."""

    def __init__(self, storage: Path, limit_gib: float) -> None:
        super().__init__(storage, limit_gib)
        self.seconds: dict[str, float] = defaultdict(float)

    def table(self, name: str, write: Callable[[Path], None]) -> Path:
        """As that of `TableStore`."""
        started = time.monotonic()
        path = super().table(name, write)
        self.seconds[name.split("-")[0]] += time.monotonic() - started
        return path


def _some_of(splits: Splits, num_train: int) -> Splits:
    """Some training and validation images, in the order of their content: as good as at random."""
    parts = [_first(splits.rows(TRAIN), num_train), _first(splits.rows(VALIDATION), NUM_VALIDATION)]
    return replace(splits, manifest=pa.concat_tables(parts))


def _first(rows: pa.Table, number: int) -> pa.Table:
    return rows.sort_by([("content_hash", "ascending")]).slice(0, number)


def _image_bytes(splits: Splits) -> int:
    """Of the files of training and validation."""
    sizes: Sequence[int] = [
        size
        for split in (TRAIN, VALIDATION)
        for size in splits.rows(split)["num_bytes"].to_pylist()
    ]
    return sum(sizes)
