"""Preparing a study: pixels of all views and the frozen encoder's features, written once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drtune_ray.config import DataConfig, digest
from drtune_ray.data.cache import read_images, write_array
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.views import Normalization, Pixels, ViewMaker
from drtune_ray.training.backbones import Backbone, read_backbone

BATCH_ROWS = 64


def prepare_tables(
    config: DataConfig, classes: tuple[str, ...], images: Path, backbone_file: Path, device: str
) -> Tables:
    """Write what the trials share and is not there yet; atomic, so any number may try.

    Args:
        config: The data settings.
        classes: Names in the order of the labels.
        images: The table of encoded images.
        backbone_file: The pretrained encoder, as `Backbone.write` wrote it.
        device: Where the frozen encoder runs.
    """
    backbone = read_backbone(backbone_file)
    maker = ViewMaker(config, backbone.normalization.interpolation)
    key = digest(images.name, maker.key, config.views)
    pixels_fit = _pixel_gib(config, images) <= config.cache_limit_gib
    views = images.with_name(f"views-{key}.arrow") if pixels_fit and config.views else None
    evaluation = images.with_name(f"evaluation-{key}.arrow") if pixels_fit else None
    train, validation = read_images(images)
    if views is not None and not views.exists():
        rows = ((view, row) for view in range(config.views) for row in range(len(train)))
        write_array(views, _blocks(train.training_view(maker, row, view) for view, row in rows))
    if evaluation is not None and not evaluation.exists():
        rows_ = range(len(validation))
        write_array(evaluation, _blocks(validation.evaluation_view(maker, row) for row in rows_))
    tables = Tables(classes, backbone_file, images, views, evaluation, None)
    if not config.views:
        return tables
    features = images.with_name(f"features-{digest(key, backbone.digest)}.arrow")
    if not features.exists():
        data = TrainingData(tables, config, backbone.normalization.interpolation)
        write_array(features, _features(backbone, data, torch.device(device)))
    return Tables(classes, backbone_file, images, views, evaluation, features)


def normalized(pixels: Tensor, normalization: Normalization) -> Tensor:
    """uint8 pixels (B, 3, S, S) as the network wants them: float32, channels last."""
    mean = torch.tensor(normalization.mean, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(normalization.std, device=pixels.device).view(1, 3, 1, 1)
    images = pixels.to(memory_format=torch.channels_last).float().div_(255.0)
    return images.sub_(mean).div_(std)


def _pixel_gib(config: DataConfig, images: Path) -> float:
    train, validation = read_images(images)
    num_pictures = len(train) * config.views + len(validation)
    return float(num_pictures * 3 * config.image_size**2 / 2**30)


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
    encoder = backbone.build().eval().to(device).to(memory_format=torch.channels_last)
    num_rows = len(data.train)
    batches = [range(at, min(at + BATCH_ROWS, num_rows)) for at in range(0, num_rows, BATCH_ROWS)]
    for view in range(data.num_views):
        for pixels, _ in data.training_batches(batches, view):
            images = normalized(pixels.to(device), backbone.normalization)
            yield encoder(images).float().cpu().numpy()
