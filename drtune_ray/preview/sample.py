"""Cost of preparing a study's tables: time measured on some of its images, sizes by formula."""

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
NUM_VIEW_ROWS = 1024  # images in views of the sample, about: each passes the frozen encoder
NUM_BATCHES = 4
VIEWS = "views"


@dataclass(frozen=True)
class PlannedTable:
    """A table that a study reads.

    Attributes:
        name: File name.
        num_bytes: Size, but for a few bytes of Arrow's own.
        num_rows: Images, or images in views.
        image_size: Side of the images in pixels.
        exists: Whether it was prepared before.
    """

    name: str
    num_bytes: int
    num_rows: int
    image_size: int
    exists: bool

    @property
    def kind(self) -> str:
        """``images``, ``backbone``, ``views``, ``evaluation`` or ``features``."""
        return _kind(self.name)


def planned_tables(
    checked: StudyInputs, configs: Iterable[TrialConfig], storage: Path, device: str
) -> tuple[PlannedTable, ...]:
    """Plan the tables of several trials, each table once; pixels only where they have room.

    Args:
        checked: The images and encoders.
        configs: The trials, in the order in which their tables are prepared.
        storage: Folder of the studies, whose ``cache`` holds the tables.
        device: Where the frozen encoder runs.
    """
    splits, planned = checked.splits, dict[str, PlannedTable]()
    num_train, num_validation = splits.count(TRAIN), splits.count(VALIDATION)
    images, image_bytes = images_name(splits), _image_bytes(splits)
    for config in configs:
        data, backbone = config.data, checked.encoder_of(config)
        weights, num_views = backbone_name(backbone), num_train * data.views
        maker = ViewMaker(data, backbone.normalization.interpolation)
        names = table_names(data, maker, images, weights, device)
        sizes = table_sizes(data, num_train, num_validation, backbone.num_features, names)
        sizes |= {images: image_bytes, weights: backbone.num_bytes}
        rows = {images: num_train + num_validation, weights: 1, names.evaluation: num_validation}
        rows |= {names.views: num_views, names.features: num_views} if data.views else {}
        together = {name: table.num_bytes for name, table in planned.items()} | sizes
        if sum(together.values()) > data.cache_limit_gib * 2**30:
            rows = {n: rows[n] for n in rows if n not in (names.evaluation, names.views)}
        for name, num_rows in rows.items():
            exists = (storage / CACHE_FOLDER / name).exists()
            table = PlannedTable(name, sizes[name], num_rows, data.image_size, exists)
            planned.setdefault(name, table)
    return tuple(planned.values())


@dataclass(frozen=True)
class Sample:
    """Some of the images, prepared.

    Attributes:
        config: The trial that reads them.
        tables: Their tables.
        num_train: Training images of the sample.
        num_validation: Validation images of the sample.
        row_seconds: Time to prepare a row, by kind of table.
    """

    config: TrialConfig
    tables: Tables
    num_train: int
    num_validation: int
    row_seconds: dict[str, float]

    def seconds(self, tables: Iterable[PlannedTable]) -> float:
        """Return the time to prepare the tables not there yet; other image sizes by pixels."""
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
    """Prepare some of the images as a study prepares all of them, and time it.

    Args:
        checked: All images, and the encoders.
        configs: The trials to be measured on them, the base first; they read the same tables.
        folder: Takes the tables.
        device: Where the frozen encoder runs.
        with_pixels: Whether the study's own tables hold the pixels of the views.
    """
    bank_size, size = max(c.method.bank_size for c in configs), configs[0].training.batch_size
    num_batches = max(NUM_BATCHES, -(-max(NUM_TRAIN, bank_size) // size))
    parts = [
        _first(checked.splits.rows(TRAIN), num_batches * size),
        _first(checked.splits.rows(VALIDATION), NUM_VALIDATION),
    ]
    splits = replace(checked.splits, manifest=pa.concat_tables(parts))
    num_train, num_validation = (part.num_rows for part in parts)
    views = min(configs[0].data.views, max(1, NUM_VIEW_ROWS // num_train))
    config = configs[0].with_values({"data.views": views})
    limit_gib = float("inf") if with_pixels else 0.0
    with _TimedStore(folder, limit_gib) as store:
        tables = build_tables(replace(checked, splits=splits), config, store, device)
    num_rows = {
        "images": num_train + num_validation,
        "backbone": 1,
        "views": num_train * views,
        "evaluation": num_validation,
        "features": num_train * views,
    }
    row_seconds = {kind: spent / num_rows[kind] for kind, spent in store.seconds.items()}
    return Sample(config, tables, num_train, num_validation, row_seconds)


class _TimedStore(TableStore):
    """A store that records how long each kind of table took."""

    def __init__(self, storage: Path, limit_gib: float) -> None:
        super().__init__(storage, limit_gib)
        self.seconds: dict[str, float] = defaultdict(float)

    def table(self, name: str, write: Callable[[Path], None]) -> Path:
        """Build a table as `TableStore` does."""
        started = time.monotonic()
        path = super().table(name, write)
        self.seconds[_kind(name)] += time.monotonic() - started
        return path


def _kind(name: str) -> str:
    return name.partition("-")[0]


def _first(rows: pa.Table, number: int) -> pa.Table:
    """Return some rows in the order of their images' content: as good as at random."""
    return rows.sort_by([("content_hash", "ascending")]).slice(0, number)


def _image_bytes(splits: Splits) -> int:
    """Return the size of the files of training and validation."""
    return sum(sum(splits.rows(split)["num_bytes"].to_pylist()) for split in (TRAIN, VALIDATION))
