"""MLflow's SQLite database: created atomically, checked, and moved with its storage.

MLflow creates an empty database by about fifty migrations without a common transaction: a process
killed among them leaves a file that cannot be opened any more, and two processes that start at the
same time conflict.
"""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from drtune_ray.errors import EnvironmentProblem

ARTIFACTS_NAME = "mlartifacts"
LOCK_SECONDS = 5.0  # a process that writes to the database may hold it
# Where the storage's own artifacts are; MLflow gives its default experiment a folder below.
OWN_ARTIFACTS = re.compile(rf"(file://.*/{ARTIFACTS_NAME})(/0)?$")
# What names a place in the artifacts, by table.
LOCATIONS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
RELOCATIONS = tuple(
    f"UPDATE {table} SET {column} = :present || substr({column}, length(:former) + 1) "  # nosec B608
    f"WHERE substr({column} || '/', 1, length(:former) + 1) = :former || '/'"
    for table, columns in LOCATIONS.items()
    for column in columns
)


def make_database(uri: str, artifacts: Path | None = None) -> None:
    """Make the database of a tracking URI ready if it is an SQLite file: a missing one is created.

    Args:
        uri: Tracking URI of any kind, with its secrets.
        artifacts: Folder of the artifacts if the database is the storage's own: what it names
            in the storage's former place, before that was copied or moved, is in this one.

    Raises:
        EnvironmentProblem: If the file is damaged.
    """
    path = sqlite_file(uri)
    if path is None:
        return
    if path.is_file() and path.stat().st_size > 0:
        with _as_problem(path), closing(sqlite3.connect(path, LOCK_SECONDS)) as database:
            _check(database)
            if artifacts is not None:
                _relocate(database, artifacts)
        return
    if path.exists():
        _discard_empty(path)
    content = _empty_database(path.parent / ARTIFACTS_NAME)  # built in a temporary folder
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


@contextmanager
def _as_problem(path: Path) -> Iterator[None]:
    """Turn errors of a database into one message."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):  # by a process that writes to it; MLflow waits for that
            return
        raise EnvironmentProblem(
            f"{path}, which holds MLflow's runs, cannot be used ({error})"
        ) from None
    except sqlite3.DatabaseError as error:
        raise EnvironmentProblem(
            f"{path}, which holds MLflow's runs, is damaged ({error}): move it away, and "
            "`drtune-ray sync` records each study of this storage again"
        ) from None


def _check(database: sqlite3.Connection) -> None:
    (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(str(found).splitlines()[0])


def _relocate(database: sqlite3.Connection, artifacts: Path) -> None:
    """Let the artifacts of the storage's former place be those of its present one."""
    present = artifacts.as_uri()
    locations = database.execute("SELECT artifact_location FROM experiments").fetchall()
    found = (OWN_ARTIFACTS.match(location or "") for (location,) in locations)
    for former in {match[1] for match in found if match} - {present}:
        if _is_same_folder(former, artifacts):
            continue
        with database:
            for update in RELOCATIONS:
                database.execute(update, {"present": present, "former": former})


def _is_same_folder(uri: str, folder: Path) -> bool:
    try:
        return os.path.samefile(unquote(urlsplit(uri).path), folder)
    except OSError:
        return False


def _discard_empty(path: Path) -> None:
    """Remove an empty file; a crash or a full disk leaves one."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}, which is to hold MLflow's runs, cannot be used ({error.strerror}): move it "
            "away"
        ) from None


def sqlite_file(uri: str) -> Path | None:
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
