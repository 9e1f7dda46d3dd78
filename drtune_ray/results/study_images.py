"""The images that a model was trained and validated on, read again beside its folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.kinds.found import ImageReader
from drtune_ray.data.kinds.recognize import open_images
from drtune_ray.data.pixels import WhiteValues, decode
from drtune_ray.data.sources import read_bytes, whites_of
from drtune_ray.data.splits import TRAIN, VALIDATION, read_manifest
from drtune_ray.results.inference import Classifier
from drtune_ray.storage.record import SPLITS_NAME

Row = dict[str, Any]


@dataclass(frozen=True)
class StudyImages:
    """Training and validation images of a study; the sealed split is not among them.

    Attributes:
        reader: Reader of the images.
        training: Rows of the training images.
        validation: Rows of the validation images.
        whites: Values that become white in images of more than 8 bits.
    """

    reader: ImageReader
    training: list[Row]
    validation: list[Row]
    whites: WhiteValues

    def open(self, row: Row) -> Image.Image:
        """Decode the image of a row.

        Raises:
            ConfigError: If it is missing or changed since the study.
        """
        return decode(read_bytes(self.reader, row), self.whites)

    def logits(self, classifier: Classifier, rows: Iterable[Row]) -> Tensor:
        """Return a model's logits (n, C) for rows, in their order."""
        return torch.cat([logits for _, logits in classifier.logits(rows, self.open)])


def study_images(folder: Path, data: DataConfig) -> StudyImages | None:
    """Return the images of a study or training; None where its splits are not at hand.

    Args:
        folder: Folder of the study.
        data: Its source of images.

    Raises:
        ConfigError: If the source cannot be read.
    """
    manifest = read_manifest(folder / SPLITS_NAME)
    if manifest is None:
        return None
    training, validation = (
        manifest.filter(pc.equal(manifest["split"], split)).to_pylist()
        for split in (TRAIN, VALIDATION)
    )
    return StudyImages(open_images(data), training, validation, whites_of(manifest))
