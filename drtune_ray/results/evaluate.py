"""Evaluate a model on the sealed test split; only this module reads its images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from drtune_ray.data.kinds.found import ImageReader
from drtune_ray.data.pixels import WhiteValues, decode
from drtune_ray.data.sources import read_bytes, whites_of
from drtune_ray.data.splits import TEST, VALIDATION, read_manifest
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.folders import Folder, append_line, as_problem
from drtune_ray.results.class_tables import ClassTables, class_tables
from drtune_ray.results.evaluation_record import Accuracy, Evaluation
from drtune_ray.results.inference import BATCH_ROWS, Classifier
from drtune_ray.results.winner import Winner, read_winner
from drtune_ray.results.words import counted
from drtune_ray.storage.record import SPLITS_NAME
from drtune_ray.tracking.events import now_ms
from drtune_ray.values import digest

OPENINGS_NAME, OPENINGS_FOLDER = "test-openings.jsonl", "test-openings"


def evaluate(
    winner_folder: Path,
    manifest_path: Path,
    root: Path | ImageReader,
    storage: Path,
    *,
    artifacts: Folder | None = None,
    again: bool = False,
) -> Evaluation:
    """Evaluate a model on the sealed test split and record the opening.

    Args:
        winner_folder: Folder of the model.
        manifest_path: Table of the study's splits, in its folder.
        root: Folder of images, or their reader.
        storage: Folder of the studies, in which openings are recorded.
        artifacts: Second place for the record of openings, which outlives this disk.
        again: Whether to allow an opening after the first.

    Raises:
        ConfigError: If the split was opened before, or an image is missing or changed.
        EnvironmentProblem: If the opening cannot be recorded.
    """
    winner = read_winner(winner_folder)
    manifest = _manifest(manifest_path)
    split = check_unopened(manifest, storage, artifacts, again=again)
    recorded = winner.about["val_accuracy"]
    rows = _rows(manifest, VALIDATION)
    whites = whites_of(manifest)
    validation = None if recorded is None else measure(winner, root, rows, whites)
    # Recorded before the result is known: an interrupted evaluation counts as an opening.
    time_ms = _open(split, winner_folder, manifest_path.parent, storage, artifacts)
    tables = measure(winner, root, split.rows, whites)
    return Evaluation(
        Accuracy.of(tables),
        None if validation is None else Accuracy.of(validation),
        recorded,
        split.num_openings + 1,
        time_ms,
        tables=tables,
    )


@dataclass(frozen=True)
class SplitAnswers:
    """Answers of several models on the test split, which was opened once for all of them.

    Attributes:
        correct: Whether each image was classified correctly, (N,) for each model.
        hashes: Hash of the content of each image.
        num_openings: Number of openings of this test split, including this one.
        time_ms: Time of the opening, in milliseconds since 1970.
    """

    correct: dict[str, NDArray[np.bool_]]
    hashes: tuple[str, ...]
    num_openings: int
    time_ms: int


def evaluate_models(
    models: Mapping[str, Callable[[], Winner]],
    opened_for: Path,
    manifest_path: Path,
    root: Path | ImageReader,
    storage: Path,
    *,
    artifacts: Folder | None = None,
    again: bool = False,
) -> SplitAnswers:
    """Open the sealed test split once for several models and record the opening.

    Args:
        models: What loads each model.
        opened_for: Folder that the record of the opening names.
        manifest_path: Table of the splits, which is the same for all models.
        root: Folder of images, or their reader.
        storage: Folder of the studies, in which openings are recorded.
        artifacts: Second place for the record of openings, which outlives this disk.
        again: Whether to allow an opening after the first.

    Raises:
        ConfigError: If the split was opened before, or an image is missing or changed.
        EnvironmentProblem: If the opening cannot be recorded.
    """
    manifest = _manifest(manifest_path)
    split = check_unopened(manifest, storage, artifacts, again=again)
    time_ms = _open(split, opened_for, manifest_path.parent, storage, artifacts)
    whites = whites_of(manifest)
    correct = {
        name: _correct(measure(load(), root, split.rows, whites)) for name, load in models.items()
    }
    hashes = tuple(str(row["content_hash"]) for row in split.rows)
    return SplitAnswers(correct, hashes, split.num_openings + 1, time_ms)


def _correct(tables: ClassTables) -> NDArray[np.bool_]:
    correct = np.ones(tables.num_images, dtype=np.bool_)
    correct[[mistake.row for mistake in tables.mistakes]] = False
    return correct


@dataclass(frozen=True)
class SealedSplit:
    """A test split that may be opened.

    Attributes:
        rows: Rows of its images.
        seal: What identifies it.
        num_openings: Number of openings so far.
    """

    rows: list[dict[str, Any]]
    seal: str
    num_openings: int


def check_unopened(
    manifest: pa.Table, storage: Path, artifacts: Folder | None = None, *, again: bool = False
) -> SealedSplit:
    """Return the test split of a table of splits, without opening it.

    Args:
        manifest: Table of splits.
        storage: Folder of the studies, in which openings are recorded.
        artifacts: Second place for the record of openings.
        again: Whether it may have been opened before.

    Raises:
        ConfigError: If it was opened before.
        EnvironmentProblem: If the record of openings is damaged.
    """
    test, seal = _rows(manifest, TEST), _seal(manifest)
    if not again and (damaged := damaged_openings(storage, artifacts)):
        raise EnvironmentProblem(
            f"{', '.join(damaged)} cannot be read, and may be an opening of this test split: "
            "correct or remove the line, or add --again to open the split anyway"
        )
    known = read_openings(storage, artifacts)
    openings = [entry for entry in known if entry["test_split"] == seal]
    if openings and not again:
        raise ConfigError(
            f"this test split of {len(test)} images was opened before "
            f"({counted(len(openings), 'time')}), first by {openings[0]['model']}: a split that is "
            "used repeatedly no longer estimates "
            "the accuracy on new images; add --again to open it anyway"
        )
    return SealedSplit(test, seal, len(openings))


def _open(
    split: SealedSplit, model: Path, study: Path, storage: Path, artifacts: Folder | None
) -> int:
    """Record an opening, also in the folders of the studies with this split; return its time."""
    entry: dict[str, Any] = {"test_split": split.seal, "model": str(model), "time_ms": now_ms()}
    _record_opening(json.dumps(entry), storage, artifacts)
    keep_openings(study, storage, artifacts)
    for folder in _studies_of(split.seal, storage):
        with suppress(EnvironmentProblem):  # of another user; the storage's record counts
            keep_openings(folder, storage, artifacts)
    return int(entry["time_ms"])


def _manifest(path: Path) -> pa.Table:
    manifest = read_manifest(path)
    if manifest is None:
        raise ConfigError(
            f"{path} is missing, which lists the test images: repeat the command that "
            "trained the model to write it again"
        )
    return manifest


@dataclass(frozen=True)
class StudyImages:
    """Images of a study by the hash of their content.

    Attributes:
        sealed: Images of the sealed test split, on which nothing but `evaluate` may measure.
        used: Images that the model was trained or chosen on.
    """

    sealed: frozenset[str]
    used: frozenset[str]


def images_of(folder: Path) -> StudyImages | None:
    """Return the images of the study or training in a folder; None if it has no splits."""
    manifest = read_manifest(folder / SPLITS_NAME)
    if manifest is None:
        return None
    sealed = frozenset(row["content_hash"] for row in _rows(manifest, TEST))
    return StudyImages(sealed, frozenset(manifest["content_hash"].to_pylist()) - sealed)


def keep_openings(folder: Path, storage: Path, artifacts: Folder | None = None) -> None:
    """Write the openings of a study's test split into its folder, so that a copy of it has them.

    Args:
        folder: Folder of the study or training.
        storage: Folder of the studies.
        artifacts: Second place for the record of openings.

    Raises:
        EnvironmentProblem: If they cannot be written.
    """
    manifest = read_manifest(folder / SPLITS_NAME)
    if manifest is None:
        return
    seal, path = _seal(manifest), folder / OPENINGS_NAME
    there = path.read_bytes().split(b"\n") if path.is_file() else []
    for line in _lines(storage, artifacts):
        entry = _opening(line)
        if entry is not None and entry["test_split"] == seal and line not in there:
            _append(path, line)


def _seal(manifest: pa.Table) -> str:
    """Return what identifies a test split, whatever the folder of its images."""
    return digest(sorted(row["content_hash"] for row in _rows(manifest, TEST)))


def _studies_of(seal: str, storage: Path) -> Iterator[Path]:
    """Yield the folders of the studies that have this test split and can be read."""
    for path in storage.glob(f"*/{SPLITS_NAME}"):
        with suppress(EnvironmentProblem):  # its own command names the damage
            manifest = read_manifest(path)
            if manifest is not None and _seal(manifest) == seal:
                yield path.parent


def read_openings(storage: Path, artifacts: Folder | None = None) -> list[dict[str, Any]]:
    """Return all recorded openings of test splits, oldest first; damaged ones are left out."""
    found = [entry for entry in _openings(storage, artifacts).values() if entry is not None]
    once = {(entry["time_ms"], entry["test_split"]): entry for entry in found}
    return [once[key] for key in sorted(once)]


def openings_of(
    folder: Path, storage: Path, artifacts: Folder | None = None
) -> list[dict[str, Any]]:
    """Return the recorded openings of a study's test split, oldest first.

    Args:
        folder: Folder of the study or training.
        storage: Folder of the studies.
        artifacts: Second place for the record of openings.

    Raises:
        EnvironmentProblem: If the table of splits is damaged, or the artifacts do not answer.
    """
    manifest = read_manifest(folder / SPLITS_NAME)
    if manifest is None:
        return []
    seal = _seal(manifest)
    return [entry for entry in read_openings(storage, artifacts) if entry["test_split"] == seal]


def damaged_openings(storage: Path, artifacts: Folder | None = None) -> list[str]:
    """Return the places of records of openings that cannot be read."""
    found = _openings(storage, artifacts)
    return [place for place, entry in found.items() if entry is None]


def _openings(storage: Path, artifacts: Folder | None) -> dict[str, dict[str, Any] | None]:
    """Return each different opening by its place, None where it is damaged."""
    return {place: _opening(line) for line, place in _lines(storage, artifacts).items()}


def _lines(storage: Path, artifacts: Folder | None) -> dict[bytes, str]:
    """Return each different line of the records of openings, with its place.

    Studies have copies in their folders, which come along when a study is copied elsewhere.
    """
    places: dict[bytes, str] = {}
    for path in (*sorted(storage.glob(f"*/{OPENINGS_NAME}")), storage / OPENINGS_NAME):
        content = path.read_bytes() if path.exists() else b""
        places |= {line: f"{path}:{at}" for at, line in enumerate(content.split(b"\n"), 1)}
    if artifacts is not None:
        folder = artifacts.below(OPENINGS_FOLDER)
        with as_problem(folder.address("")):
            places |= {folder.read(name): folder.address(name) for name in folder.names()}
    return {line: place for line, place in places.items() if line.strip()}


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
    _append(storage / OPENINGS_NAME, line.encode())


def _append(path: Path, line: bytes) -> None:
    try:
        append_line(path, line)
    except OSError as error:
        raise EnvironmentProblem(
            f"{path} cannot be written ({error.strerror}), and an opening of the test split must "
            "be recorded: make it writable"
        ) from error


def measure(
    winner: Winner,
    root: Path | ImageReader,
    rows: Iterable[dict[str, Any]],
    whites: WhiteValues,
    batch_size: int = BATCH_ROWS,
) -> ClassTables:
    """Measure a model on rows of a manifest, at least one; on a GPU where there is one."""

    def open_image(row: dict[str, Any]) -> Image.Image:
        return decode(read_bytes(root, row), whites)

    labels, paths, probabilities = [], [], []
    for batch, logits in Classifier(winner, batch_size=batch_size).logits(rows, open_image):
        labels += [int(row["label"]) for row, _ in batch]
        paths += [str(row["path"]) for row, _ in batch]
        probabilities.append(logits.float().softmax(1))
    return class_tables(labels, torch.cat(probabilities).numpy(), winner.classes, paths)


def _rows(manifest: pa.Table, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = manifest.filter(
        pa.compute.equal(manifest["split"], split)
    ).to_pylist()
    return rows
