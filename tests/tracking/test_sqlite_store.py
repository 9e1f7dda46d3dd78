from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.tracking import sqlite_store
from drtune_ray.tracking.mlflow_recorder import MlflowRecorder
from drtune_ray.tracking.sqlite_store import make_database

# Ends the process between two statements of a migration that replaces a table.
KILLED = """
import os, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine

@event.listens_for(Engine, "before_cursor_execute")
def end(connection, cursor, statement, *_):
    if statement.startswith("INSERT INTO _alembic_tmp"):
        os._exit(9)

from drtune_ray.tracking.mlflow_recorder import MlflowRecorder
MlflowRecorder(sys.argv[1], "flowers", "study").run_id(None)
"""


def test_make_database__killed_among_the_migrations(tmp_path: Path) -> None:
    # MLflow by itself leaves a half-made file then, which nobody can open again.
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "aside").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "aside")}
    command = [sys.executable, "-c", KILLED, uri]
    assert subprocess.run(command, check=False, env=environment).returncode == 9
    shutil.rmtree(tmp_path / "aside")
    assert MlflowRecorder(uri, "flowers", "study").run_id(None) is None
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "http://host:$PORT",
        "http://host:",
        "folder",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:mlflow.db?mode=ro&uri=true",
    ],
)
def test_make_database__nothing_of_other_stores(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_database(uri)
    assert not list(tmp_path.iterdir())


def test_make_database__at_an_address_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM", "red")
    uri = f"sqlite:///{tmp_path}/$TEAM.db"
    assert MlflowRecorder(uri, "flowers", "study").run_id(None) is None
    assert [path.name for path in tmp_path.iterdir()] == ["red.db"]


@pytest.mark.parametrize("has_links", [True, False])
def test_make_database__another_process_was_first(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mlflow.db"

    def made_meanwhile(artifacts: Path) -> bytes:
        path.write_text("of the other")
        return b"of this one"

    def no_links(*paths: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(sqlite_store, "_empty_database", made_meanwhile)
    if not has_links:
        monkeypatch.setattr(sqlite_store.os, "link", no_links)
    make_database(f"sqlite:///{path}")
    assert path.read_text() == "of the other"
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_make_database__without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*paths: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(sqlite_store, "_empty_database", lambda artifacts: b"tables")
    monkeypatch.setattr(sqlite_store.os, "link", no_links)
    folder = tmp_path / "new"
    make_database(f"sqlite:///{folder / 'mlflow.db'}")
    assert (folder / "mlflow.db").read_bytes() == b"tables"
    assert len(list(folder.iterdir())) == 1


# ---- damaged files


def test_make_database__an_empty_file_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "_empty_database", lambda artifacts: b"tables")
    (tmp_path / "mlflow.db").touch()
    make_database(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert (tmp_path / "mlflow.db").read_bytes() == b"tables"


def test_make_database__a_folder(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.mkdir()
    with pytest.raises(EnvironmentProblem) as caught:
        make_database(f"sqlite:///{path}")
    assert str(caught.value) == (
        f"{path}, which is to hold MLflow's runs, cannot be used (Is a directory): move it away"
    )


def cut_in_half(content: bytes) -> bytes:
    return content[: len(content) // 2 + 100]


def without_its_start(content: bytes) -> bytes:
    return b"x" * 100 + content[100:]


@pytest.mark.parametrize("damaged", [cut_in_half, without_its_start])
def test_make_database__damaged(tmp_path: Path, damaged: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE experiments (artifact_location TEXT)")
        database.executemany("INSERT INTO experiments VALUES (?)", [("x" * 999,)] * 99)
    content = damaged(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(EnvironmentProblem) as caught:
        make_database(f"sqlite:///{path}", tmp_path / "mlartifacts")
    assert str(caught.value).startswith(f"{path}, which holds MLflow's runs, is damaged (")
    assert str(caught.value).endswith(
        "): move it away, and `drtune-ray sync` records each study of this storage again"
    )
    assert path.read_bytes() == content


def test_make_database__in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "LOCK_SECONDS", 0.1)
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE experiments (artifact_location TEXT)")
        database.execute("BEGIN EXCLUSIVE")
        make_database(f"sqlite:///{path}")  # MLflow waits for it
