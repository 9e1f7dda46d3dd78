"""MLflow's SQLite database, made whole or not at all.

MLflow makes an empty database by some fifty migrations that no transaction holds together: a
process that is killed among them leaves a file that no later one can open, and two processes that
start at once disturb each other.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any


def make_database(uri: str) -> None:
    """Make the database of a tracking URI if it is an SQLite file that does not exist.

    Args:
        uri: Tracking URI of any kind, as it is opened.
    """
    path = _sqlite_file(uri)
    if path is None or path.exists():
        return
    content = _empty_database(path.parent / "mlartifacts")  # where a kill leaves nothing here
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
    """The file of a plain SQLite address."""
    from sqlalchemy import make_url

    if not uri.startswith("sqlite"):
        return None
    name = make_url(uri).database or ""
    return None if not name or name.startswith((":", "file:")) else Path(name)


def _empty_database(artifacts: Path) -> bytes:
    """A database with all tables."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    make_store: Any = SqlAlchemyStore  # MLflow has no types for it
    with tempfile.TemporaryDirectory(prefix="mlflow-") as folder:
        path = Path(folder) / "mlflow.db"
        make_store(f"sqlite:///{path}", str(artifacts)).engine.dispose()
        return path.read_bytes()


def _publish(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, it does not replace another process's
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            temporary.replace(path)
