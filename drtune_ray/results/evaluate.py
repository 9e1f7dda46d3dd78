"""Evaluate a model on the sealed test split; only this module reads its images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from drtune_ray.data.pixels import WhiteValues, decode
from drtune_ray.data.sources import read_bytes, whites_of
from drtune_ray.data.splits import TEST, VALIDATION, read_manifest
from drtune_ray.data.views import ViewMaker
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.folders import Folder, append_line, as_problem
from drtune_ray.results.evaluation_record import Accuracy, Evaluation
from drtune_ray.results.winner import Winner, read_winner
from drtune_ray.tracking.events import now_ms
from drtune_ray.training.frozen_features import Normalizer
from drtune_ray.values import digest

BATCH_ROWS = 64
OPENINGS_NAME, OPENINGS_FOLDER = "test-openings.jsonl", "test-openings"


def evaluate(
    winner_folder: Path,
    manifest_path: Path,
    root: Path,
    storage: Path,
    *,
    artifacts: Folder | None = None,
    again: bool = False,
) -> Evaluation:
    """Evaluate a model on the sealed test split and record the opening.

    Args:
        winner_folder: Folder of the model.
        manifest_path: Table of the study's splits.
        root: Folder of images.
        storage: Folder in which openings are recorded.
        artifacts: Second place for the record of openings, which outlives this disk.
        again: Whether to allow an opening after the first.

    Raises:
        ConfigError: If the split was opened before, or an image is missing or changed.
        EnvironmentProblem: If the opening cannot be recorded.
    """
    winner = read_winner(winner_folder)
    manifest = read_manifest(manifest_path)
    if manifest is None:
        raise ConfigError(
            f"{manifest_path} is missing, which lists the test images: repeat the command that "
            "trained the model to write it again"
        )
    test = _rows(manifest, TEST)
    seal = digest(sorted(row["content_hash"] for row in test))
    if not again and (damaged := damaged_openings(storage, artifacts)):
        raise EnvironmentProblem(
            f"{', '.join(damaged)} cannot be read, and may be an opening of this test split: "
            "correct or remove the line, or add --again to open the split anyway"
        )
    known = read_openings(storage, artifacts)
    openings = [entry for entry in known if entry["test_split"] == seal]
    if openings and not again:
        raise ConfigError(
            f"this test split of {len(test)} images was opened {len(openings)} time(s) before, "
            f"first by {openings[0]['model']}: a split that is used repeatedly no longer estimates "
            "the accuracy on new images; add --again to open it anyway"
        )
    recorded = winner.about["val_accuracy"]
    rows = _rows(manifest, VALIDATION)
    whites = whites_of(manifest)
    validation = None if recorded is None else measure(winner, root, rows, whites)
    # Recorded before the result is known: an interrupted evaluation counts as an opening.
    entry: dict[str, Any] = {"test_split": seal, "model": str(winner_folder), "time_ms": now_ms()}
    _record_opening(json.dumps(entry), storage, artifacts)
    return Evaluation(
        measure(winner, root, test, whites),
        validation,
        recorded,
        len(openings) + 1,
        entry["time_ms"],
    )


def read_openings(storage: Path, artifacts: Folder | None = None) -> list[dict[str, Any]]:
    """Return all recorded openings of test splits, oldest first; damaged ones are left out."""
    found = [entry for entry in _openings(storage, artifacts).values() if entry is not None]
    return sorted(found, key=lambda entry: entry["time_ms"])


def damaged_openings(storage: Path, artifacts: Folder | None = None) -> list[str]:
    """Return the places of records of openings that cannot be read."""
    found = _openings(storage, artifacts)
    return [place for place, entry in found.items() if entry is None]


def _openings(storage: Path, artifacts: Folder | None) -> dict[str, dict[str, Any] | None]:
    """Return each different opening by its place, None where it is damaged."""
    path = storage / OPENINGS_NAME
    content = path.read_bytes() if path.exists() else b""
    places = {line: f"{path}:{at}" for at, line in enumerate(content.split(b"\n"), 1)}
    if artifacts is not None:
        folder = artifacts.below(OPENINGS_FOLDER)
        with as_problem(folder.address("")):
            places |= {folder.read(name): folder.address(name) for name in folder.names()}
    return {place: _opening(line) for line, place in places.items() if line.strip()}


def _opening(line: bytes) -> dict[str, Any] | None:
    """Return the opening of a line, None if the line is damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kinds = {"test_split": str, "model": str, "time_ms": int}
    is_sound = isinstance(entry, dict) and all(
        isinstance(entry.get(name), kind) for name, kind in kinds.items()
    )
    return entry if is_sound else None


def _record_opening(line: str, storage: Path, artifacts: Folder | None) -> None:
    if artifacts is not None:
        folder = artifacts.below(OPENINGS_FOLDER)
        with as_problem(folder.address("")):
            folder.write(f"{digest(line)}.json", line.encode())
    try:
        append_line(storage / OPENINGS_NAME, line.encode())
    except OSError as error:
        raise EnvironmentProblem(
            f"{storage / OPENINGS_NAME} cannot be written ({error.strerror}), and an opening of "
            "the test split must be recorded: make the storage writable"
        ) from error


@torch.inference_mode()
def measure(
    winner: Winner, root: Path, rows: Iterable[dict[str, Any]], whites: WhiteValues
) -> Accuracy:
    """Return the accuracy of a model on rows of a manifest."""
    maker = ViewMaker(winner.trial.data, winner.normalization.interpolation)
    model = winner.model.to(memory_format=torch.channels_last)
    normalizer = Normalizer(winner.normalization, torch.device("cpu"))
    rows = list(rows)
    num_correct = 0
    for at in range(0, len(rows), BATCH_ROWS):
        part = rows[at : at + BATCH_ROWS]
        views = [maker.evaluation_view(decode(read_bytes(root, row), whites)) for row in part]
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
