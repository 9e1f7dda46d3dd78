"""What decides a study's results, and the check that a name is not reused for another study."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drtune_ray.config.study import TrackingConfig
from drtune_ray.config.trial import TRIAL_NOT_DECIDING, deciding_settings
from drtune_ray.errors import ConfigError
from drtune_ray.storage.record import RECORD_FILE, Record, read_record

# Raised when a change of the package changes the numbers that a trial gives.
NUMERIC_VERSION = 3
# Settings that may differ between two runs of the same study, or of the same training.
NOT_DECIDING = (
    "name",
    "storage",
    "optuna_storage",
    "artifacts",
    "trials",
    "budget",
    "finalists",
    "final_fit",
    "resources",
    "tracking",
    *TRIAL_NOT_DECIDING,
    *(f"trial.{path}" for path in TRIAL_NOT_DECIDING),
)
DATA_DIGEST = "content of the images and splits"
WEIGHTS_DIGEST = "content of the pretrained weights"
NUMERICS = "numeric version of drtune-ray"
SEVERAL_WORKERS = "several workers a trial"
ImageChanges = Callable[[], Sequence[str]]
ADVICE = {
    SEVERAL_WORKERS: " (training.workers may change, but not between 1 and more than 1)",
}


def deciding_values(
    config: Mapping[str, Any], data_digest: str, weights_digest: str
) -> dict[str, Any]:
    """Return everything that decides the results of a study or training, as a flat mapping."""
    kept = deciding_settings(config, NOT_DECIDING)
    if "trial" in config:
        # One worker runs the authors' reference trial with local BatchNorm statistics, as their
        # code does; of several, each would see a part of the batch (`reference_config`).
        kept[SEVERAL_WORKERS] = config["trial"]["training"]["workers"] != 1
    return kept | {
        DATA_DIGEST: data_digest,
        WEIGHTS_DIGEST: weights_digest,
        NUMERICS: NUMERIC_VERSION,
    }


def former_record(
    folder: Path,
    kind: str,
    deciding: Mapping[str, Any],
    image_changes: ImageChanges = tuple,
) -> Record | None:
    """Return the record in the folder if its deciding values are equal; None if there is none.

    Args:
        folder: Folder of the study or training.
        kind: `STUDY` or `TRAINING`.
        deciding: What decides the results; see `deciding_values`.
        image_changes: Returns how the images differ from those of the record, in sentences that
            replace their two hashes; empty if that is not known.

    Raises:
        ConfigError: If the name is taken by another configuration, with the differences.
    """
    if not (folder / RECORD_FILE).exists():
        return None
    former = read_record(folder)
    differing = [
        key
        for key in sorted(former.deciding.keys() | deciding.keys())
        if former.deciding.get(key) != deciding.get(key)
    ]
    images = [f"  {change}" for change in image_changes()] if DATA_DIGEST in differing else []
    differences = images + [
        f"  {key}: {former.deciding.get(key)!r} there, {deciding.get(key)!r} here"
        + ADVICE.get(key, "")
        for key in differing
        if key != DATA_DIGEST or not images
    ]
    if former.kind != kind:
        differences = [f"  it is a {former.kind}, this is a {kind}"]
    if differences:
        raise ConfigError(
            f"the name {folder.name!r} under {folder.parent} is taken by another configuration; "
            "give this one another --name, or repeat the former command:\n" + "\n".join(differences)
        )
    return former


def open_record(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    deciding: dict[str, Any],
    tracking: TrackingConfig,
    artifacts: str | None = None,
    image_changes: ImageChanges = tuple,
) -> Record:
    """Update the record in the folder if its deciding values are equal, or write a new one.

    Args:
        folder: Folder of the study or training.
        kind: `STUDY` or `TRAINING`.
        config: Resolved configuration, as plain values.
        deciding: What decides the results; see `deciding_values`.
        tracking: Settings of MLflow.
        artifacts: URI of the artifacts; None without any.
        image_changes: See `former_record`.

    Raises:
        ConfigError: If the name is taken by another configuration, with the differences.
    """
    former = former_record(folder, kind, deciding, image_changes)
    place = tracking.model_dump(mode="json")
    if former is None:
        study_id = f"{folder.name}-{uuid.uuid4().hex[:12]}"
        record = Record(folder, study_id, kind, dict(config), deciding, place, artifacts)
    else:
        record = replace(former, config=dict(config), tracking=place, artifacts=artifacts)
    record.write()
    return record
