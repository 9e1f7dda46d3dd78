"""Places of models: the names, folders, files and URIs that commands take."""

from __future__ import annotations

import os
from pathlib import Path

from drtune_ray.results.exported import is_exported, read_exported
from drtune_ray.results.winner import ABOUT_NAME, Winner, read_winner
from drtune_ray.storage.record import WINNER_NAME, find_study
from drtune_ray.tracking.mlflow_client import artifacts_folder, default_tracking_uri
from drtune_ray.tracking.model_registry import SCHEME, fetched
from drtune_ray.values import full_path


def open_model(model: str, storage: str, tracking_uri: str | None = None) -> Winner:
    """Load a model from wherever it lies.

    Args:
        model: Name of a study or training, its folder, a model's folder, an exported file, or
            MLflow's URI of a registered model.
        storage: Folder of the studies, for a name.
        tracking_uri: MLflow's tracking URI; by default that of the environment, else the store
            in the folder of the studies.

    Raises:
        ConfigError: If there is no such model.
        EnvironmentProblem: If it is damaged.
    """
    if model.startswith(SCHEME):
        own = default_tracking_uri(full_path(storage))
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own
        artifacts = artifacts_folder(full_path(storage)) if uri == own else None
        with fetched(model, uri, artifacts) as folder:
            return read_winner(folder)
    path = full_path(model)
    return read_exported(path) if is_exported(path) else read_winner(model_folder(model, storage))


def model_folder(model: str, storage: str) -> Path:
    """Return the folder of a model.

    Args:
        model: Name of a study or training, its folder, or a model's folder.
        storage: Folder of the studies, for a name.

    Raises:
        ConfigError: If there is no such study.
    """
    folder = full_path(model)
    if (folder / ABOUT_NAME).exists():
        return folder
    return find_study(model, storage) / WINNER_NAME


def local_folder(model: str, storage: str) -> Path | None:
    """Return the folder of a model; None for an exported file and a model in MLflow.

    Args:
        model: See `open_model`.
        storage: See `open_model`.

    Raises:
        ConfigError: If there is no such study.
    """
    if model.startswith(SCHEME) or is_exported(full_path(model)):
        return None
    return model_folder(model, storage)


def served_model(model: str, storage: str, tracking_uri: str | None) -> tuple[str, str | None]:
    """Return a model and its tracking URI as any process on this machine can load it.

    Args:
        model: See `open_model`.
        storage: See `open_model`.
        tracking_uri: See `open_model`.

    Raises:
        ConfigError: If there is no such model.
        EnvironmentProblem: If it is damaged.
    """
    open_model(model, storage, tracking_uri)  # now, rather than in a process that starts for it
    if model.startswith(SCHEME):
        own = default_tracking_uri(full_path(storage))
        return model, tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own
    path = full_path(model)
    return str(path if is_exported(path) else model_folder(model, storage)), None
