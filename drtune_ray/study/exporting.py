"""Exporting the model of a study, and recording the file with the study's run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from drtune_ray.data.pixels import UndecodableImageError, decode
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.folders import files_as_problem
from drtune_ray.results.export import FORMATS, NUM_CHECKED, Exported, export, export_int8
from drtune_ray.results.places import model_folder
from drtune_ray.results.study_images import StudyImages, study_images
from drtune_ray.results.winner import Winner, read_winner
from drtune_ray.storage.record import RECORD_FILE, SPOOL_NAME
from drtune_ray.study.sync import sync_study
from drtune_ray.tracking.events import FilesReady
from drtune_ray.tracking.spool import Spool

logger = logging.getLogger(__name__)
EXPORTS = "exports"  # folder of a study, and of its run in MLflow


@files_as_problem()
def export_model(
    model: str,
    storage: str,
    kind: str,
    output: Path | None = None,
    images: Sequence[str] = (),
    *,
    is_int8: bool = False,
) -> Exported:
    """Write the model of a study as one file.

    Args:
        model: Name of a study or training, its folder, or a model's folder.
        storage: Folder of the studies.
        kind: One of `FORMATS`.
        output: The file; by default in the study's folder, from where MLflow gets a copy.
        images: Paths of images to compare on; by default validation images of the study.
        is_int8: Whether ONNX has 8 bits.

    Raises:
        ConfigError: If there is no such model, or no image to compare on.
        DrtuneError: If the model cannot be converted.
        EnvironmentProblem: If a package is missing.
    """
    if is_int8 and kind != "onnx":
        raise ConfigError(f"--int8 goes with --to onnx, not with --to {kind}: leave it out")
    folder = model_folder(model, storage)
    winner = read_winner(folder)
    study = folder.parent if (folder.parent / RECORD_FILE).exists() else None
    path = _path(winner, kind, output, study, is_int8=is_int8)
    known = None if study is None else study_images(study, winner.trial.data)
    if is_int8:
        found = export_int8(winner, path, _needed(known, folder))
    else:
        found = export(winner, path, _pictures(winner, known, images, folder))
    if output is None and study is not None:
        _record(study, found.path, storage)
    return found


def _path(
    winner: Winner, kind: str, output: Path | None, study: Path | None, *, is_int8: bool
) -> Path:
    """Return the file to write.

    Raises:
        ConfigError: If its suffix is another format's.
    """
    suffix = FORMATS[kind]
    if output is None:
        name = winner.about.get("study") or "model"
        file = f"{name}-int8{suffix}" if is_int8 else f"{name}{suffix}"
        return Path.cwd() / file if study is None else study / EXPORTS / file
    if output.suffix.lower() != suffix:
        raise ConfigError(f"--output {output} must end in {suffix} with --to {kind}")
    return output.absolute()


def _needed(known: StudyImages | None, folder: Path) -> StudyImages:
    if known is None or not known.validation:
        raise ConfigError(
            f"--int8 measures its ranges and its loss on the images of the study, and {folder} "
            "lies without its study: give the study's name or folder"
        )
    return known


def _pictures(
    winner: Winner, known: StudyImages | None, images: Sequence[str], folder: Path
) -> list[Image.Image]:
    """Return the images to compare on.

    Raises:
        ConfigError: If there are none, or one cannot be read.
    """
    if not images and known is not None:
        rows = (known.validation or known.training)[:NUM_CHECKED]
        return [known.open(row) for row in rows]
    if not images:
        raise ConfigError(
            f"{folder} lies without the images of its study, and an export is compared with the "
            "model on real ones: add --images FILES"
        )
    found = []
    for path in images[:NUM_CHECKED]:
        try:
            found.append(decode(Path(path).read_bytes(), winner.whites))
        except (OSError, UndecodableImageError) as error:
            raise ConfigError(f"--images {path} cannot be read ({error}): leave it out") from None
    return found


def _record(study: Path, path: Path, storage: str) -> None:
    Spool(study / SPOOL_NAME).append(FilesReady(None, str(path), EXPORTS))
    try:
        sync_study(str(study), storage)
    except EnvironmentProblem as error:
        logger.warning("%s; `drtune-ray sync` sends the file later", error)
