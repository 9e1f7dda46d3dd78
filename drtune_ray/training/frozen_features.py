"""Tables written once a study: the pixels of all views and the features of the frozen encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.cache import read_images, table_name, write_array
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.table_store import TableStore
from drtune_ray.data.views import Normalization, Pixels, ViewMaker
from drtune_ray.errors import ConfigError
from drtune_ray.training.backbones import Backbone, read_backbone

BATCH_ROWS = 64
FEATURES_DTYPE = "float32"


def prepare_tables(
    store: TableStore,
    config: DataConfig,
    classes: tuple[str, ...],
    images: Path,
    backbone_file: Path,
    device: str,
) -> Tables:
    """Write the shared tables of the trials that do not exist yet; safe in several processes.

    Args:
        store: Store of the tables, which keeps them as long as it is open.
        config: Data settings.
        classes: Class names in the order of the labels.
        images: Table of encoded images.
        backbone_file: Pretrained encoder, as `Backbone.write` wrote it.
        device: Device on which the frozen encoder runs.
    """
    backbone = read_backbone(backbone_file)
    maker = ViewMaker(config, backbone.normalization.interpolation)
    names = table_names(config, maker, images.name, backbone_file.name, device)
    tables = Tables(classes, backbone_file, images, None, None, None)
    train, validation = read_images(images)
    sizes = table_sizes(config, len(train), len(validation), backbone.num_features, names)
    if store.has_room(sizes):
        tables = _with_pixels(tables, store, config, maker, names)
    if not config.views:
        return tables

    def write_features(path: Path) -> None:
        data = TrainingData(tables, config, backbone.normalization.interpolation)
        write_array(path, _features(backbone, data, torch.device(device)))

    return replace(tables, features=store.table(names.features, write_features))


class Normalizer:
    """Normalise uint8 pixels to the mean and standard deviation that the network expects.

    Args:
        normalization: Mean and standard deviation.
        device: Device of the pixels. The numbers are copied there once, since a device waits for
            such a copy.
        dtype: Precision of the normalised images.
    """

    def __init__(
        self,
        normalization: Normalization,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dtype = dtype
        mean, std = normalization.mean, normalization.std
        self._mean = torch.tensor(mean, device=device, dtype=dtype).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device, dtype=dtype).view(1, 3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 (B, 3, S, S), channels last."""
        images = pixels.to(memory_format=torch.channels_last).to(self._dtype).div_(255.0)
        return images.sub_(self._mean).div_(self._std)


class TableNames(NamedTuple):
    """File names of the tables of all trials that share data settings and backbone."""

    views: str
    evaluation: str
    features: str


def table_names(
    config: DataConfig, maker: ViewMaker, images_name: str, backbone_name: str, device: str
) -> TableNames:
    """Return the names of the tables; the names of images and backbone identify their content."""
    views = (images_name, maker.training_key, config.views)
    # Kernels differ between devices and releases by more than rounding.
    numerics = (backbone_name, FEATURES_DTYPE, device, torch.__version__)
    return TableNames(
        table_name("views", *views),
        table_name("evaluation", images_name, maker.evaluation_key),
        table_name("features", *views, *numerics),
    )


def table_sizes(
    config: DataConfig,
    num_train: int,
    num_validation: int,
    num_features: int,
    names: TableNames,
) -> dict[str, int]:
    """Return the size of each table by name, in bytes, without the few that Arrow adds."""
    picture, num_views = 3 * config.image_size**2, num_train * config.views
    return {
        names.views: num_views * picture,
        names.evaluation: num_validation * picture,
        names.features: config.views * features_size(num_train, num_features),
    }


def features_size(num_rows: int, num_features: int) -> int:
    """Return the size of the frozen features of so many rows, in bytes."""
    return num_rows * num_features * np.dtype(FEATURES_DTYPE).itemsize


def _with_pixels(
    tables: Tables, store: TableStore, config: DataConfig, maker: ViewMaker, names: TableNames
) -> Tables:
    """Add the pixels of all views to the tables, so that no epoch decodes images."""
    train, validation = read_images(tables.images)

    def write_evaluation(path: Path) -> None:
        rows = range(len(validation))
        write_array(path, _blocks(validation.evaluation_view(maker, row) for row in rows))

    def write_views(path: Path) -> None:
        rows = ((view, row) for view in range(config.views) for row in range(len(train)))
        write_array(path, _blocks(train.training_view(maker, row, view) for view, row in rows))

    has_validation = len(validation) > 0  # a final fit has none
    evaluation = store.table(names.evaluation, write_evaluation) if has_validation else None
    views = store.table(names.views, write_views) if config.views else None
    return replace(tables, evaluation=evaluation, views=views)


def _blocks(pictures: Iterator[Pixels]) -> Iterator[NDArray[np.uint8]]:
    block: list[Pixels] = []
    for picture in pictures:
        block.append(picture)
        if len(block) == BATCH_ROWS:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


@torch.inference_mode()
def _features(
    backbone: Backbone, data: TrainingData, device: torch.device
) -> Iterator[NDArray[np.float32]]:
    encoder = backbone.build_frozen().to(device).to(memory_format=torch.channels_last)
    normalizer = Normalizer(backbone.normalization, device)
    num_rows = len(data.train)
    batches = [range(at, min(at + BATCH_ROWS, num_rows)) for at in range(0, num_rows, BATCH_ROWS)]
    for view in range(data.num_views):
        for pixels, _ in data.training_batches(batches, view):
            features = encoder(normalizer(pixels.to(device))).float().cpu().numpy()
            if not np.isfinite(features).all():
                raise ConfigError(
                    f"{backbone.name} with these weights gives features that are not finite "
                    f"(view {view}): check backbone.weights"
                )
            yield features
