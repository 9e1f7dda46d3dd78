"""The doctor of files, databases and object stores, all real; no Ray is reached here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import BUCKET, database, object_store_here
from tests.small import write_coloured

pytestmark = pytest.mark.xdist_group("doctor-storage")

COMMAND = str(Path(sys.executable).with_name("drtune-ray"))
SECRET = "open-sesame"  # noqa: S105
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    with object_store_here():
        yield


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with database(tmp_path_factory.mktemp("database") / "data") as url:
        yield url.replace(":@", ":$DATABASE_PASSWORD@")


def run(*arguments: str, mounted: str = "true") -> dict[str, tuple[str, str]]:
    """The command's lines: state and text by check.

    Args:
        arguments: Of the command.
        mounted: What is done before, in a mount namespace of its own.
    """
    command = " ".join([COMMAND, "doctor", *arguments])
    done = subprocess.run([*UNSHARE, f"{mounted} && {command}"], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this machine does not let tests mount a file system")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = (re.fullmatch(r"(\S+) +([^:]+): (.+)", line) for line in done.stdout.splitlines())
    found = {line[2]: (line[1], line[3]) for line in lines if line}
    num_failed = sum(state == "FAILED" for state, _ in found.values())
    assert done.stderr.startswith(f"drtune-ray: {num_failed} of {len(found)} checks failed: ")
    return found


# ---- the file system


def test_storage__sound_and_left_as_it_was(examined: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    storage = tmp_path / "studies"
    before = os.umask(0o022)
    try:
        found = examined(storage=str(storage))
    finally:
        os.umask(before)
    assert found["storage"] == ("ok", f"{storage} can be written and read")
    assert found["storage owner"] == ("ok", "no other user may write to the storage")
    assert re.fullmatch(r"[\d.]+ GiB free under the storage", found["storage space"][1])
    assert found["mlflow"] == (
        "ok",
        f"sqlite:///{storage}/mlflow.db, which the first study creates",
    )
    assert found["shared files"] == ("skipped", "needs 'ray', which was skipped")
    assert list(tmp_path.iterdir()) == []


def test_storage__a_file_is_in_the_way(examined: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    storage = tmp_path / "file" / "studies"
    state, text = examined(storage=str(storage))["storage"]
    assert state == "failed"
    assert re.sub(r"probe-\w+", "PROBE", text) == (
        f"{storage}/PROBE cannot be written, read and removed ([Errno 20] Not a directory: "
        f"'{storage}'): give a --storage that this user may write to"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        ("mount -t tmpfs -o ro none {}", r"[Errno 30] Read-only file system: '{}/.PROBE.tmp'"),
        (
            "mount -t tmpfs -o size=64k none {0} && (yes 2>/dev/null >{0}/filler; true)",
            "[Errno 28] No space left on device: '{}/PROBE'",
        ),
    ],
    ids=["read-only", "full"],
)
def test_storage__read_only_or_full(tmp_path: Path, closed_port: str, mount: str, reason: str):
    found = run(
        "--storage", str(tmp_path), "--address", closed_port, mounted=mount.format(tmp_path)
    )
    state, text = found["storage"]
    assert state == "FAILED"
    assert re.sub(r"probe-\w+(\.\w+(?=\.tmp))?", "PROBE", text) == (
        f"{tmp_path}/PROBE cannot be written, read and removed ({reason.format(tmp_path)}): give a "
        "--storage that this user may write to"
    )
    assert found["storage owner"] == ("skipped", "needs 'storage', which failed")
    # The other checks have run.
    if "size" in mount:
        assert found["storage space"] == (
            "FAILED",
            f"{tmp_path}: 0.00 GiB free, but at least 1.00 GiB needed: free space there "
            "(`drtune-ray preview` shows what a study needs)",
        )
    else:
        assert found["storage space"][0] == "ok"
    assert found["ray address"][0] == "FAILED"


def test_storage__that_others_may_write_to(examined: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert examined(storage=str(tmp_path))["storage owner"] == (
        "warning",
        f"other users may write to {tmp_path} and change every result there; none of it is "
        f"executed as code; `chmod go-w {tmp_path}` restricts it to you",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_storage__of_another_user(examined: Any, tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, -1)
    assert examined(storage=str(tmp_path))["storage owner"] == (
        "warning",
        f"{tmp_path} belongs to user 12345, who can change every result there; none of it is "
        "executed as code",
    )


def test_mlflow__a_store_that_is_none(examined: Any, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database, but a text that is long enough " * 40)
    state, text = examined(storage=str(tmp_path))["mlflow"]
    assert state == "failed"
    assert text.startswith(f"sqlite:///{tmp_path}/mlflow.db failed (")
    assert "file is not a database" in text
    assert text.endswith("): see the server's log")


# ---- images and weights


def test_files__under_an_unknown_home(examined: Any, tmp_path: Path) -> None:
    found = examined(storage=str(tmp_path), weights="~nobody-at-all/w.pth")
    reason = "'~nobody-at-all/w.pth' begins with an unknown home directory: write the full path"
    assert found["weights"] == ("failed", reason)


def test_files__not_there(examined: Any, tmp_path: Path) -> None:
    found = examined(storage=str(tmp_path), weights=str(tmp_path / "w.pth"))
    assert found["weights"] == (
        "failed",
        f"{tmp_path}/w.pth cannot be read (No such file or directory): give --weights another path",
    )
    assert found["weights on nodes"] == ("skipped", "needs 'nodes', which was skipped")


def test_files__a_hub_that_is_away(examined: Any, tmp_path: Path, unreachable_hub: None) -> None:
    state, text = examined(storage=str(tmp_path), backbone="resnet50.a1_in1k")["weights"]
    assert state == "failed"
    assert text.startswith("the weights of 'resnet50.a1_in1k' must be fetched from ")


@pytest.mark.slow
def test_files__of_a_study(tmp_path: Path, closed_port: str) -> None:
    images = write_coloured(tmp_path / "images", 6)
    arguments = ["--storage", str(tmp_path / "s"), "--address", closed_port]
    found = run("--data", str(images), "--weights", "demo", *arguments)
    assert found["data"] == ("ok", f"{images} can be read")
    assert found["weights"][0] == "ok"
    assert found["trials"] == ("skipped", "needs 'ray', which was skipped")
    (tmp_path / "empty").mkdir()
    found = run("--data", str(tmp_path / "empty"), "--weights", "demo", *arguments)
    assert found["data"] == (
        "FAILED",
        f"{tmp_path}/empty cannot be read (it holds no file): give --data another path",
    )


# ---- servers


def test_artifacts(s3: None, examined: Any, tmp_path: Path) -> None:
    uri = f"s3://{BUCKET}/doctor"
    assert examined(storage=str(tmp_path), artifacts=uri)["artifacts"] == (
        "ok",
        f"{uri} can be written, read and removed",
    )
    found = examined(storage=str(tmp_path), artifacts="s3://no-such-bucket/x")
    state, text = found["artifacts"]
    assert state == "failed"
    assert re.match(r"artifacts: s3://no-such-bucket/x/probe-\w+ cannot be written, read and", text)
    assert text.endswith(
        "): check the address, that the bucket or folder exists, and the credentials in the "
        "environment"
    )


def test_database(
    postgres: str, examined: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", SECRET)
    found = examined(storage=str(tmp_path), optuna_storage=postgres)["optuna_storage"]
    assert found == ("ok", f"{postgres} accepts studies")
    away = "postgresql+psycopg://u:$DATABASE_PASSWORD@127.0.0.1:9/none"
    state, text = examined(storage=str(tmp_path), optuna_storage=away)["optuna_storage"]
    assert (state, SECRET in text) == ("failed", False)
    assert text.startswith(f"optuna_storage={away!r} cannot be used: ")
    monkeypatch.delenv("DATABASE_PASSWORD")
    assert examined(storage=str(tmp_path), optuna_storage=away)["optuna_storage"] == (
        "failed",
        f"{away} needs the environment variable DATABASE_PASSWORD: set it",
    )


def test_a_password_in_an_address_is_bad_input(tmp_path: Path) -> None:
    uri = f"http://me:{SECRET}@127.0.0.1:9"
    done = subprocess.run(
        [COMMAND, "doctor", "--tracking-uri", uri, "--storage", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "drtune-ray: tracking_uri: the password would be recorded with the study: write $NAME in "
        "its place, and put the password into the environment variable NAME\n"
    )
