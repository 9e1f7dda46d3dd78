"""Create MLflow's SQLite database atomically.

MLflow creates an empty database by about fifty migrations without a common transaction: a process
killed among them leaves a file that cannot be opened any more, and two processes that start at the
same time conflict.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any


def make_database(uri: str) -> None:
    """Create the database of a tracking URI if it is an SQLite file that does not exist.

    Args:
        uri: Tracking URI of any kind, with its secrets.
    """
    path = _sqlite_file(uri)
    if path is None or path.exists():
        return
    content = _empty_database(path.parent / "mlartifacts")  # built in a temporary folder
    path.parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sqlite_file(uri: str) -> Path | None:
    """Return the file of a plain SQLite URI, None for any other URI."""
    from sqlalchemy import make_url

    if not uri.startswith("sqlite"):
        return None
    name = make_url(uri).database or ""
    return None if not name or name.startswith((":", "file:")) else Path(name)


def _empty_database(artifacts: Path) -> bytes:
    """Return the content of a database with all tables and no rows."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    make_store: Any = SqlAlchemyStore  # untyped in MLflow
    with tempfile.TemporaryDirectory(prefix="mlflow-") as folder:
        path = Path(folder) / "mlflow.db"
        make_store(f"sqlite:///{path}", str(artifacts)).engine.dispose()
        return path.read_bytes()


def _publish(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, keeps the file of another process
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            temporary.replace(path)
