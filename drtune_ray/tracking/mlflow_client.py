"""How MLflow is reached: its variables, and the addresses of a storage's own store."""

from __future__ import annotations

import os
from pathlib import Path

from drtune_ray.tracking.sqlite_store import ARTIFACTS_NAME

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # Keeps MLflow from printing the server's address, with its password, at the end of each run.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The writer retries by itself: an outage must not block it for minutes, and a request to create
    # a run that is repeated because its answer was lost creates a second run.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

MEANS_SOMETHING_IN_A_URI = frozenset("?%$")


def quiet_mlflow() -> None:
    """Disable telemetry and shorten retries; call it before importing mlflow."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # A run id in the environment would replace the parent of every run.
    os.environ.pop("MLFLOW_RUN_ID", None)


def default_tracking_uri(storage: Path) -> str:
    """Return the URI of the SQLite database in the storage."""
    path = str(storage / "mlflow.db")
    if not MEANS_SOMETHING_IN_A_URI & set(path):
        return f"sqlite:///{path}"
    from sqlalchemy import URL

    # With a driver's name: for `sqlite:` MLflow creates the folder that the quoted path names.
    uri = URL.create("sqlite+pysqlite", database=path).render_as_string()
    return uri.replace("$", "%24")  # `with_secrets` would take it for a variable


def artifacts_folder(storage: Path) -> Path:
    """Return the folder of the artifacts of the storage's own database."""
    return storage / ARTIFACTS_NAME
