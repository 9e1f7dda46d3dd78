"""The model of a study in MLflow's registry: what is recorded with it, and its promotion."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS
from drtune_ray.config.study import TrackingConfig
from drtune_ray.data.splits import VALIDATION, read_manifest
from drtune_ray.errors import ConfigError
from drtune_ray.folders import files_as_problem
from drtune_ray.results.evaluation_record import WEIGHTS_NAME, sha256_of
from drtune_ray.results.winner import read_about
from drtune_ray.storage.record import SPLITS_NAME, WINNER_NAME, find_study, read_record
from drtune_ray.study.sync import as_problem, sync_study
from drtune_ray.tracking.events import ModelReady
from drtune_ray.tracking.mlflow_recorder import build_recorder
from drtune_ray.tracking.model_registry import (
    ACCURACY_TAG,
    METRIC_TAG,
    VALIDATION_TAG,
    VALUE_TAG,
    WEIGHTS_TAG,
    Promotion,
)
from drtune_ray.values import digest


def model_ready(folder: Path) -> ModelReady:
    """Return the event by which MLflow registers the model of a study or training.

    Args:
        folder: Its folder, whose name the model gets.
    """
    model = folder / WINNER_NAME
    tags, about = {WEIGHTS_TAG: sha256_of(model / WEIGHTS_NAME)}, read_about(model)
    if (accuracy := about.get("val_accuracy")) is not None:
        tags[ACCURACY_TAG] = repr(float(accuracy))
    if (name := about.get("metric", DEFAULT_METRIC)) != DEFAULT_METRIC:
        tags[METRIC_TAG] = name
        if (value := about[METRICS[name].measure]) is not None:
            tags[VALUE_TAG] = repr(float(value))
    manifest = read_manifest(folder / SPLITS_NAME)
    if manifest is not None:
        rows = manifest.filter(pc.equal(manifest["split"], VALIDATION))
        hashes, labels = (rows[name].to_pylist() for name in ("content_hash", "label"))
        tags[VALIDATION_TAG] = digest(sorted(zip(hashes, labels, strict=True)))
    return ModelReady(None, str(model), folder.name, tags)


@files_as_problem()
def promote_model(name_or_folder: str, storage: str, *, everything: bool = False) -> Promotion:
    """Make the model of a study the champion of its name in MLflow if it beats the present one.

    Args:
        name_or_folder: Name of the study or training, or its folder.
        storage: Folder of the studies.
        everything: See `sync_study`, which is called first.

    Raises:
        ConfigError: If there is no such study, or it has no model yet.
        EnvironmentProblem: If MLflow cannot be reached, or lacks the model.
    """
    record = read_record(find_study(name_or_folder, storage))
    if not (record.folder / WINNER_NAME / WEIGHTS_NAME).exists():
        raise ConfigError(
            f"{record.folder.name} has no model to promote: repeat its command until it is done"
        )
    sync_study(name_or_folder, storage, everything=everything)
    tracking = TrackingConfig(**record.tracking)
    recorder = build_recorder(tracking, record.folder.parent, record.study_id)
    with as_problem("MLflow did not promote the model"):
        return recorder.promote(model_ready(record.folder))
