"""The tables of a study as batches for a trial, without the test split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from drtune_ray.config.inputs import DataConfig
from drtune_ray.config.training import MAX_EPOCHS
from drtune_ray.data.cache import ImageRows, MappedArray, read_images
from drtune_ray.data.views import Pixels, ViewMaker

Batch = tuple[Tensor, Tensor]
Drawn = tuple[int, int | None]  # image and view; None: the evaluation view


@dataclass(frozen=True)
class Tables:
    """Paths of the prepared tables of a study, and the names of its classes.

    Attributes:
        classes: Class names in the order of the labels.
        backbone: Weights of the pretrained encoder, safetensors.
        images: Encoded images of training and validation.
        views: Pixels of all training views, view by view; None where they exceed the limit.
        evaluation: Pixels of the validation images; None where they exceed the limit.
        features: The frozen encoder's features of all training views; None for live features.
    """

    classes: tuple[str, ...]
    backbone: Path
    images: Path
    views: Path | None
    evaluation: Path | None
    features: Path | None

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values, for sending to another process."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Tables:
        """Build from the values of :meth:`to_mapping`."""
        paths = {
            key: None if value is None else Path(value)
            for key, value in values.items()
            if key != "classes"
        }
        return cls(classes=tuple(values["classes"]), **paths)  # type: ignore[arg-type]


class TrainingData:
    """Training and validation images of a study.

    Args:
        tables: The prepared tables.
        config: The data settings that they were prepared for.
        interpolation: Interpolation that the pretrained weights expect.
    """

    def __init__(self, tables: Tables, config: DataConfig, interpolation: str) -> None:
        self.classes = tables.classes
        self.train, self.validation = read_images(tables.images)
        self.num_views = config.views
        self._config = config
        self._maker = ViewMaker(config, interpolation)
        self._views = None if tables.views is None else MappedArray(tables.views)
        self._evaluation = None if tables.evaluation is None else MappedArray(tables.evaluation)
        self._features = None if tables.features is None else MappedArray(tables.features)

    @property
    def has_features(self) -> bool:
        """Whether the frozen features are prepared; otherwise the frozen encoder must run."""
        return self._features is not None

    def view_of_epoch(self, epoch: int) -> int:
        """Return the view for an epoch (from 0; -1 is before the first)."""
        return epoch % self.num_views if self.num_views else epoch

    def training_batches(self, batches: Sequence[Sequence[int]], view: int) -> Iterator[Batch]:
        """Yield pixels (B, 3, S, S) uint8 and labels (B,) for each batch of rows.

        Row r + i N of N images is row r in the i-th next view: an image that an epoch repeats is
        never the same picture twice as long as there are views.
        """
        drawn = [[self._drawn(row, view) for row in batch] for batch in batches]
        return self._load(_Views(self.train, self._maker, self._views), drawn)

    def validation_batches(self, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Yield :meth:`training_batches` of the evaluation view of validation images."""
        drawn = [[(row, None) for row in batch] for batch in batches]
        return self._load(_Views(self.validation, self._maker, self._evaluation), drawn)

    def pretrained_features(self, rows: Sequence[int], view: int) -> Tensor | None:
        """Return z^p of :meth:`training_batches`, (rows, D); None if they are not prepared."""
        if self._features is None:
            return None
        drawn, num_rows = (self._drawn(row, view) for row in rows), len(self.train)
        return torch.from_numpy(self._features.take(at * num_rows + row for row, at in drawn))

    def _drawn(self, row: int, view: int) -> tuple[int, int]:
        """Image and view of a row that is counted on at each repetition."""
        repetition, row = divmod(row, len(self.train))
        if self.num_views:
            return row, (view + repetition) % self.num_views
        return row, view + repetition * MAX_EPOCHS  # new views are numbered by epoch

    def _load(self, dataset: _Views, batches: Sequence[Sequence[Drawn]]) -> Iterator[Batch]:
        workers = 0 if dataset.is_mapped else self._config.loader_workers
        return iter(
            DataLoader(
                dataset,
                batch_sampler=[list(batch) for batch in batches],
                num_workers=workers,
                collate_fn=_collate,
                pin_memory=torch.cuda.is_available(),
                # A separate generator: the loader must not advance the trial's random state.
                generator=torch.Generator().manual_seed(0),
            )
        )


class _Views(Dataset[tuple[Pixels, int]]):
    """Pixels of images in views, mapped from a table if there is one."""

    def __init__(self, images: ImageRows, maker: ViewMaker, mapped: MappedArray | None) -> None:
        self.images, self.maker, self.mapped = images, maker, mapped

    @property
    def is_mapped(self) -> bool:
        return self.mapped is not None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, drawn: Drawn) -> tuple[Pixels, int]:
        row, view = drawn
        label = int(self.images.labels[row])
        if self.mapped is not None:
            return self.mapped[(view or 0) * len(self.images) + row], label
        if view is None:
            return self.images.evaluation_view(self.maker, row), label
        return self.images.training_view(self.maker, row, view), label


def _collate(samples: list[tuple[Pixels, int]]) -> Batch:
    pixels = torch.stack([torch.tensor(pixels) for pixels, _ in samples])
    return pixels, torch.tensor([label for _, label in samples])
