from __future__ import annotations

import logging
import os
import pickle
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from drtune_ray.data.remote_tables import RemoteTables
from drtune_ray.data.table_store import TableStore, damage, seal
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.folders import (
    Folder,
    LocalFolder,
    ObjectFolder,
    atomic_write,
    check_folder,
    files_as_problem,
    open_folder,
)
from tests.servers import BUCKET, object_store_here


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    with object_store_here():
        yield


@pytest.fixture(params=["file", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """The same rules for both kinds."""
    if request.param == "file":
        return open_folder((tmp_path / "artifacts").as_uri())
    request.getfixturevalue("s3")
    return open_folder(f"s3://{BUCKET}/{tmp_path.name}")


# ---- a folder, of either kind


def test_folder__files_by_name(folder: Folder) -> None:
    assert folder.names() == []
    folder.write("b", b"1", memoryview(b"234"))
    folder.write("a", b"")
    folder.below("deep").write("c", b"5")
    assert folder.names() == ["a", "b"]
    assert (folder.read("b"), folder.read("a")) == (b"1234", b"")
    folder.write("b", b"new")
    assert folder.read("b") == b"new"
    assert (folder.folders(), folder.below("deep").folders()) == (["deep"], [])
    assert folder.below("none").folders() == []
    folder.remove("b")
    folder.remove("b")  # gone already
    assert folder.names() == ["a"]
    assert folder.below("deep").read("c") == b"5"


def test_folder__missing(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read("none")
    with pytest.raises(FileNotFoundError):
        folder.download("none", tmp_path / "copy")
    assert not any(path.is_file() for path in tmp_path.iterdir())


def test_folder__copies(folder: Folder, tmp_path: Path) -> None:
    content = os.urandom(12 * 2**20)  # more than one part of an upload
    (tmp_path / "table").write_bytes(content)
    folder.upload(tmp_path / "table", "table")
    folder.download("table", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == content
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]


def test_folder__travels_to_another_process(folder: Folder) -> None:
    folder.write("a", b"1")
    assert pickle.loads(pickle.dumps(folder)).read("a") == b"1"


def test_check_folder__works(folder: Folder) -> None:
    check_folder(folder)
    assert folder.names() == []


def test_check_folder__no_such_bucket(s3: None) -> None:
    with pytest.raises(EnvironmentProblem, match=r"^artifacts: s3://none/x/probe-.* cannot be"):
        check_folder(open_folder("s3://none/x"))


def test_check_folder__a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(EnvironmentProblem, match="check the address"):
        check_folder(open_folder((tmp_path / "taken").as_uri()))


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://a:$PW@bucket/p?region=%zz", "'s3://a:$PW@bucket/p?region=%zz'"),
        ("s3://bucket/p?region=us-east-1&endpoint_override=$PW.invalid", "host: $PW.invalid"),
    ],
)
def test_object_folder__no_password_in_what_fails(
    uri: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = "open-sesame"  # noqa: S105
    monkeypatch.setenv("PW", secret)
    folder = open_folder(uri)
    actions = (
        lambda: folder.write("a", b"1"),
        lambda: folder.read("a"),
        lambda: folder.upload(Path(__file__), "a"),
        lambda: folder.download("a", tmp_path / "a"),
        folder.names,
    )
    for act in actions:
        with pytest.raises((OSError, ValueError)) as caught:
            act()
        assert secret not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(EnvironmentProblem) as refused:
        check_folder(folder)
    assert told in str(refused.value)
    assert secret not in str(refused.value)


# ---- a file


def noted_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls that make a file last, in their order."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append("fsync folder" if path.is_dir() else "fsync file")
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        calls.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    return calls


@pytest.mark.parametrize(
    ("is_durable", "expected"),
    [(True, ["fsync file", "replace", "fsync folder"]), (False, ["replace"])],
)
def test_atomic_write(
    is_durable: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file"
    calls = noted_calls(monkeypatch)
    atomic_write(path, lambda aside: aside.write_text("new"), is_durable=is_durable)
    assert calls == expected
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_atomic_write__a_failure_leaves_the_former_file(
    error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("former")

    def fill(aside: Path) -> None:
        aside.write_text("half")
        assert path.read_text() == "former"
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, fill)
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write__a_full_disk_is_named(tmp_path: Path) -> None:
    """What a file object raises does not name its file."""
    path = tmp_path / "file"
    problem = f"{path} cannot be written, since its disk is full: free space there"
    with pytest.raises(EnvironmentProblem, match=re.escape(problem)), files_as_problem():
        atomic_write(path, lambda aside: Path("/dev/full").write_text("new"))


# ---- its address


def test_open_folder__kinds(tmp_path: Path) -> None:
    local = open_folder(f"file://{tmp_path}/with%20space")
    assert isinstance(local, LocalFolder)
    assert local.path == tmp_path / "with space"
    for uri in ("s3://bucket", "gs://bucket/prefix", "abfss://container@account/prefix"):
        assert isinstance(open_folder(uri), ObjectFolder)


@pytest.mark.parametrize(
    "uri", ["/mnt/studies", "studies", "http://x/y", "file:relative", "s3:///"]
)
def test_open_folder__refused(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_folder(uri)
    assert str(caught.value) == (
        f"artifacts={uri!r} is not valid: give file:///FOLDER, s3://BUCKET/PREFIX or "
        "gs://BUCKET/PREFIX"
    )


def test_open_folder__a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        open_folder("s3://key:sesame@bucket/prefix")
    assert "sesame" not in str(caught.value)
    assert "write $NAME in its place" in str(caught.value)


def test_object_folder__password_from_the_environment(
    s3: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_SECRET", "se/sa+me")
    folder = open_folder(f"s3://tests:$STORE_SECRET@{BUCKET}/{tmp_path.name}")
    folder.write("a", b"1")
    assert folder.read("a") == b"1"
    assert "se/sa+me" not in folder.address("a")
    assert b"se/sa+me" not in pickle.dumps(folder)
    monkeypatch.delenv("STORE_SECRET")
    with pytest.raises(ConfigError, match="needs the environment variable STORE_SECRET: set it"):
        pickle.loads(pickle.dumps(folder)).read("a")


def test_object_folder__options_stay_behind_the_prefix() -> None:
    folder = ObjectFolder("s3://bucket/prefix/?region=eu-west-1").below("trials").below("00007")
    assert folder.address("best.ckpt") == "s3://bucket/prefix/trials/00007/best.ckpt"
    assert pickle.dumps(folder).count(b"region=eu-west-1") == 1


# ---- tables for other nodes


def never(path: Path) -> None:
    raise AssertionError("it is built although it is on the shelf")


def test_table_shelf__a_node_without_the_table_gets_it(folder: Folder, tmp_path: Path) -> None:
    shelf, content = RemoteTables(folder), os.urandom(5000)
    with TableStore(tmp_path / "driver", 1.0, shelf) as store:
        store.table("images-1.safetensors", lambda path: path.write_bytes(content) and None)
    with TableStore(tmp_path / "node", 1.0, shelf) as store:
        path = store.table("images-1.safetensors", never)
        assert path == tmp_path / "node" / "cache" / "images-1.safetensors"
        assert path.read_bytes() == content
        assert damage(path) is None


def test_table_shelf__is_put_there_once(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"1")
    seal(tmp_path / "t.safetensors")
    shelf = RemoteTables(folder)
    shelf.put(tmp_path / "t.safetensors")
    monkeypatch.setattr(type(folder), "upload", never)
    shelf.put(tmp_path / "t.safetensors")


def test_table_shelf__a_damaged_one_is_built_anew_and_replaced(
    folder: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = RemoteTables(folder)
    with TableStore(tmp_path / "first", 1.0, shelf) as store:
        store.table("t.safetensors", lambda path: path.write_bytes(b"right") and None)
    (name,) = [name for name in folder.names() if not name.endswith(".seal")]
    folder.write(name, b"wrong")
    with caplog.at_level(logging.WARNING), TableStore(tmp_path / "second", 1.0, shelf) as store:
        path = store.table("t.safetensors", lambda path: path.write_bytes(b"other") and None)
        assert path.read_bytes() == b"other"
    assert re.search(r"t\.safetensors\.[0-9a-f]{8} does not match its seal", caplog.text)
    with TableStore(tmp_path / "third", 1.0, shelf) as store:
        assert store.table("t.safetensors", never).read_bytes() == b"other"
