"""Opening the sealed test split: the only place that reads its images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from drtune_ray.data.sources import decode, read_bytes
from drtune_ray.data.splits import TEST, VALIDATION
from drtune_ray.data.views import ViewMaker
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.folders import Folder, as_problem
from drtune_ray.results.winner import Winner, read_winner
from drtune_ray.tracking.events import now_ms
from drtune_ray.training.frozen_features import Normalizer
from drtune_ray.values import digest

BATCH_ROWS = 64
OPENINGS_NAME, OPENINGS_FOLDER = "test-openings.jsonl", "test-openings"
TWO_SIDED_95 = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """Right answers among images, with the 95 % Wilson interval."""

    num_correct: int
    num_images: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.num_correct / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson, "Probable inference", JASA 1927."""
        n, z = self.num_images, TWO_SIDED_95
        centre = (self.share + z * z / (2 * n)) / (1 + z * z / n)
        spread = self.share * (1 - self.share) / n + z * z / (4 * n * n)
        half = z / (1 + z * z / n) * math.sqrt(spread)
        return centre - half, centre + half


@dataclass(frozen=True)
class Evaluation:
    """What the test split said.

    Attributes:
        test: On the sealed images.
        validation: Measured again, to show that the model is the one that was recorded; None
            where it was trained on these images.
        recorded_validation: What the study recorded, 0 to 1; None likewise.
        num_openings: How often this test split was opened, this time included.
    """

    test: Accuracy
    validation: Accuracy | None
    recorded_validation: float | None
    num_openings: int


def evaluate(
    winner_folder: Path,
    manifest_path: Path,
    root: Path,
    storage: Path,
    *,
    artifacts: Folder | None = None,
    again: bool = False,
) -> Evaluation:
    """Test a model on the sealed split and record that it was opened.

    Args:
        winner_folder: The model.
        manifest_path: The study's splits.
        root: The folder of images.
        storage: Where openings are recorded.
        artifacts: Where they are recorded too, to outlive this disk.
        again: Allow an opening after the first.

    Raises:
        ConfigError: If the split was opened before, or an image is gone or changed.
        EnvironmentProblem: If the opening cannot be recorded.
    """
    winner = read_winner(winner_folder)
    if not manifest_path.exists():
        raise ConfigError(
            f"{manifest_path} is missing, which says which images are sealed: repeat the command "
            "that made the model, it writes that file again"
        )
    manifest = pq.read_table(manifest_path)
    test = _rows(manifest, TEST)
    seal = digest(sorted(row["content_hash"] for row in test))
    known = read_openings(storage, artifacts)
    openings = [entry for entry in known if entry["test_split"] == seal]
    if openings and not again:
        raise ConfigError(
            f"this test split of {len(test)} images was opened {len(openings)} time(s) before, "
            f"first by {openings[0]['model']}: a split that is looked at repeatedly no longer "
            "tells how well new images will fare; add --again to open it all the same"
        )
    recorded = winner.about["val_accuracy"]
    rows = _rows(manifest, VALIDATION)
    validation = None if recorded is None else measure(winner, root, rows)
    # Written before the answer is known: an opening that was cut short is one all the same.
    entry = {"test_split": seal, "model": str(winner_folder), "time_ms": now_ms()}
    _record_opening(json.dumps(entry), storage, artifacts)
    return Evaluation(
        measure(winner, root, test),
        validation,
        recorded,
        len(openings) + 1,
    )


def read_openings(storage: Path, artifacts: Folder | None = None) -> list[dict[str, Any]]:
    """All recorded openings of test splits, the first one first."""
    path = storage / OPENINGS_NAME
    lines = set(path.read_text().splitlines()) if path.exists() else set()
    if artifacts is not None:
        folder = artifacts.below(OPENINGS_FOLDER)
        with as_problem(folder.address("")):
            lines |= {folder.read(name).decode() for name in folder.names()}
    return sorted((json.loads(line) for line in lines), key=lambda entry: entry["time_ms"])


def _record_opening(line: str, storage: Path, artifacts: Folder | None) -> None:
    if artifacts is not None:
        folder = artifacts.below(OPENINGS_FOLDER)
        with as_problem(folder.address("")):
            folder.write(f"{digest(line)}.json", line.encode())
    try:
        with (storage / OPENINGS_NAME).open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise EnvironmentProblem(
            f"{storage / OPENINGS_NAME} cannot be written ({error.strerror}), and an opening of "
            "the test split must be recorded: make the storage writable"
        ) from error


@torch.inference_mode()
def measure(winner: Winner, root: Path, rows: Iterable[dict[str, Any]]) -> Accuracy:
    """Accuracy of a model on rows of a manifest."""
    maker = ViewMaker(winner.trial.data, winner.normalization.interpolation)
    model = winner.model.to(memory_format=torch.channels_last)
    normalizer = Normalizer(winner.normalization, torch.device("cpu"))
    rows = list(rows)
    num_correct = 0
    for at in range(0, len(rows), BATCH_ROWS):
        part = rows[at : at + BATCH_ROWS]
        views = [maker.evaluation_view(decode(read_bytes(root, row))) for row in part]
        pixels = torch.stack([torch.tensor(view) for view in views])
        labels = torch.tensor([row["label"] for row in part])
        logits = model(normalizer(pixels))
        num_correct += int((logits.argmax(1) == labels).sum())
    return Accuracy(num_correct, len(rows))


def _rows(manifest: pa.Table, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = manifest.filter(
        pa.compute.equal(manifest["split"], split)
    ).to_pylist()
    return rows
