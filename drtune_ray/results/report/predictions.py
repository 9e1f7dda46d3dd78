"""What the winner gets right and wrong on the validation images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from drtune_ray.data.kinds.found import ImageReader
from drtune_ray.data.pictures import thumbnail
from drtune_ray.data.pixels import decode
from drtune_ray.data.sources import read_bytes, whites_of
from drtune_ray.data.splits import SPLIT_COLUMN, VALIDATION, read_manifest
from drtune_ray.results.class_tables import ClassTables, class_tables
from drtune_ray.results.inference import Classifier
from drtune_ray.results.winner import read_winner

MAX_PICTURES = 24


@dataclass(frozen=True)
class Wrong:
    """A misclassified image.

    Attributes:
        path: Path of the image in its source.
        true: Its class.
        predicted: The most probable class.
        probability: Probability of the predicted class, 0 to 1.
        picture: A small picture as a data URI; empty without pictures.
    """

    path: str
    true: str
    predicted: str
    probability: float
    picture: str


@dataclass(frozen=True)
class Predictions:
    """The winner on the validation images.

    Attributes:
        tables: Metrics and tables.
        worst: Most confident mistakes.
    """

    tables: ClassTables
    worst: tuple[Wrong, ...]


def validation_rows(manifest_path: Path) -> list[dict[str, Any]]:
    """Return the validation images of a study's table of splits; none if it has no table."""
    manifest = read_manifest(manifest_path)
    if manifest is None:
        return []
    return [row for row in manifest.to_pylist() if row[SPLIT_COLUMN] == VALIDATION]


def read_predictions(
    winner_folder: Path,
    manifest_path: Path,
    source: Path | ImageReader,
    *,
    with_pictures: bool,
) -> Predictions | None:
    """Classify the validation images with a winner; None if it was trained on them.

    Args:
        winner_folder: Folder of the model.
        manifest_path: Table of the study's splits.
        source: Folder of the images, or their reader.
        with_pictures: Whether to make small pictures of the worst mistakes.

    Raises:
        ConfigError: If there is no model, or an image is missing or changed.
        EnvironmentProblem: If the model or the table is damaged.
    """
    winner, rows = read_winner(winner_folder), validation_rows(manifest_path)
    if winner.about.get("val_accuracy") is None or not rows:
        return None
    manifest = read_manifest(manifest_path)
    whites = whites_of(manifest)

    def open_image(row: dict[str, Any]) -> Image.Image:
        return decode(read_bytes(source, row), whites)

    batches = [logits for _, logits in Classifier(winner).logits(rows, open_image)]
    probabilities = torch.cat(batches).double().softmax(1).numpy()
    tables = class_tables([row["label"] for row in rows], probabilities, winner.classes)
    worst = tuple(
        Wrong(
            rows[mistake.row]["path"],
            mistake.true,
            mistake.predicted,
            mistake.probability,
            thumbnail(read_bytes(source, rows[mistake.row])) if with_pictures else "",
        )
        for mistake in tables.mistakes[:MAX_PICTURES]
    )
    return Predictions(tables, worst)
