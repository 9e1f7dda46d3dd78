"""Tables are found sound or built anew, once, and give way when the cache is over its limit."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from drtune_ray.data.cache import MappedArray, write_array
from drtune_ray.data.table_store import (
    LOCKS_FOLDER,
    TableStore,
    damage,
    seal,
    seal_of,
)
from tests.data.builder import NAME, ROWS, write_rows

ROOT = Path(__file__).parents[2]
GIB = 2**30


class CountedWriter:
    """Writes the rows, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, path: Path) -> None:
        self.count += 1
        write_rows(path)


def refuse(path: Path) -> None:
    raise AssertionError(f"{path} is built although there is one")


def built(storage: Path, name: str = NAME, write: Callable[[Path], None] = write_rows) -> Path:
    with TableStore(storage, 1.0) as store:
        return store.table(name, write)


def visible(storage: Path) -> list[str]:
    """All files and folders but the locks."""
    return sorted(path.name for path in (storage / "cache").iterdir() if path.name != LOCKS_FOLDER)


def is_rows(path: Path) -> bool:
    return bool(np.array_equal(MappedArray(path).take(range(len(ROWS))), ROWS))


# ---- built once, used again


def test_table__is_built_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = built(tmp_path)
    assert path == tmp_path / "cache" / NAME
    assert is_rows(path)
    before = path.stat()
    assert built(tmp_path, write=refuse) == path
    assert os.path.samestat(before, path.stat())
    assert visible(tmp_path) == [NAME, f"{NAME}.seal"]
    assert caplog.messages == []


def test_table__is_verified_once_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path)
    seen: list[Path] = []

    def count(path: Path) -> None:
        seen.append(path)

    monkeypatch.setattr("drtune_ray.data.table_store.damage", count)
    with TableStore(tmp_path, 1.0) as store:
        assert store.table(NAME, refuse) == store.table(NAME, refuse)
    assert len(seen) == 1


def test_table__nothing_under_the_name_until_it_is_complete(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def write(path: Path) -> None:
        write_rows(path)
        seen.append(visible(tmp_path))

    built(tmp_path, write=write)
    assert seen == [[f".{NAME}.building"]]


def test_table__a_writer_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("the machine's fault")

    with TableStore(tmp_path, 1.0) as store:
        with pytest.raises(RuntimeError, match="^the machine's fault$"):
            store.table(NAME, write)
        assert visible(tmp_path) == []
        assert is_rows(store.table(NAME, write_rows))


def test_table__readers_of_a_replaced_file_keep_it(tmp_path: Path) -> None:
    former = MappedArray(built(tmp_path))
    seal_of(tmp_path / "cache" / NAME).unlink()
    path = built(tmp_path, write=lambda path: write_array(path, [ROWS * 2]))
    assert (former[1] == ROWS[1]).all()
    assert (MappedArray(path)[1] == ROWS[1] * 2).all()


# ---- damage


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def one_byte_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_program(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def of_another_table(path: Path) -> None:
    other = path.with_name("other.arrow")
    write_array(other, [ROWS + 1])
    seal(other)
    other.replace(path)
    seal_of(other).replace(seal_of(path))


def seal_missing(path: Path) -> None:
    seal_of(path).unlink()


def seal_torn(path: Path) -> None:
    truncated(seal_of(path))


def seal_of_another_program(path: Path) -> None:
    seal_of(path).write_text("[1, 2]")


def sealed_but_not_arrow(path: Path) -> None:
    path.write_bytes(b"not a table")
    seal(path)


KINDS = [
    truncated,
    lengthened,
    one_byte_flipped,
    emptied,
    of_another_program,
    of_another_table,
    seal_missing,
    seal_torn,
    seal_of_another_program,
    sealed_but_not_arrow,
]


@pytest.mark.parametrize("damaged", KINDS)
def test_table__damaged_it_is_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: Callable[[Path], None]
) -> None:
    path = built(tmp_path)
    assert damage(path) is None
    damaged(path)
    assert damage(path) is not None
    writer = CountedWriter()
    assert built(tmp_path, write=writer) == path
    assert writer.count == 1
    assert is_rows(path) and damage(path) is None
    assert visible(tmp_path) == [NAME, f"{NAME}.seal"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{path} ")
    assert record.getMessage().endswith(": removing and rebuilding it")


def test_damage__every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = built(tmp_path)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :])
        assert damage(path) is not None, at


def test_table__removed_by_hand_it_is_built_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built(tmp_path).unlink()
    assert is_rows(built(tmp_path))
    assert caplog.messages == []


# ---- several processes


@contextmanager
def builder(storage: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process that takes so many seconds to build the table, and keeps it until it is left."""
    command = [sys.executable, "-m", "tests.data.builder", str(storage), str(seconds)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_table__two_processes_started_together_build_it_once(tmp_path: Path) -> None:
    with builder(tmp_path, 1.0) as first, builder(tmp_path, 1.0) as second:
        outputs = [process.communicate()[0].split("\n") for process in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0)
    assert sorted(outputs) == [["building", "has it", ""], ["has it", ""]]
    assert is_rows(built(tmp_path, write=refuse))


def test_table__a_killed_builder_blocks_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    with builder(tmp_path, 60.0) as process:
        assert said(process) == "building"
        assert visible(tmp_path) == [f".{NAME}.building"]
        process.kill()
    assert visible(tmp_path) == [f".{NAME}.building"]
    assert is_rows(built(tmp_path))
    assert visible(tmp_path) == [NAME, f"{NAME}.seal"]


def test_table__who_waits_for_a_builder_that_is_killed_builds(tmp_path: Path) -> None:
    with builder(tmp_path, 60.0) as first:
        assert said(first) == "building"
        with builder(tmp_path, 0.0) as second:
            first.kill()
            assert second.communicate()[0].split() == ["building", "has", "it"]
    assert is_rows(built(tmp_path, write=refuse))


def test_keep_limit__what_a_killed_builder_left_goes(tmp_path: Path) -> None:
    with builder(tmp_path, 60.0) as process, TableStore(tmp_path, 1.0) as store:
        assert said(process) == "building"
        store.keep_limit()
        assert visible(tmp_path) == [f".{NAME}.building"]  # it is still being built
        process.kill()
        process.wait()
        store.keep_limit()
    assert visible(tmp_path) == []
    assert list((tmp_path / "cache" / LOCKS_FOLDER).iterdir()) == []


def test_keep_limit__a_table_in_use_by_another_process_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with builder(tmp_path, 0.0) as process, TableStore(tmp_path, 0.0) as store:
        assert [said(process), said(process)] == ["building", "has it"]
        store.keep_limit()
        assert is_rows(tmp_path / "cache" / NAME)
        assert "more than data.cache_limit_gib=0: running studies use" in caplog.text
        process.communicate()  # closes its input: it ends
        store.keep_limit()
    assert visible(tmp_path) == []


def test_table__in_use_and_damaged_another_process_builds_it_again(tmp_path: Path) -> None:
    with builder(tmp_path, 0.0) as process:
        assert [said(process), said(process)] == ["building", "has it"]
        one_byte_flipped(tmp_path / "cache" / NAME)
        assert is_rows(built(tmp_path))
        with TableStore(tmp_path, 0.0) as store:  # and it is in use as before
            store.keep_limit()
        assert is_rows(tmp_path / "cache" / NAME)


# ---- the limit


def names(*letters: str) -> list[str]:
    return [f"{letter}.arrow" for letter in letters]


def kept(storage: Path) -> list[str]:
    return [name for name in visible(storage) if name.endswith(".arrow")]


def limit_of(num_tables: float, storage: Path) -> float:
    return num_tables * (storage / "cache" / "a.arrow").stat().st_size / GIB


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A storage with tables a, b and c, used in this order."""
    for name in names("a", "b", "c"):
        built(tmp_path, name)
    return tmp_path


@pytest.mark.parametrize(
    ("used_again", "num_tables", "left"),
    [
        ("", 3, "abc"),
        ("", 2.9, "bc"),
        ("", 2, "bc"),
        ("", 1, "c"),
        ("a", 2, "ac"),
        ("ba", 1, "a"),
        ("cba", 2, "ab"),
        ("", 0, ""),
    ],
)
def test_keep_limit__least_recently_used_first(
    three: Path, used_again: str, num_tables: float, left: str
) -> None:
    for name in names(*used_again):
        built(three, name, refuse)
    with TableStore(three, limit_of(num_tables, three)) as store:
        store.keep_limit()
    assert kept(three) == names(*left)
    assert visible(three) == sorted(names(*left) + [f"{name}.seal" for name in names(*left)])


def test_keep_limit__a_table_is_used_until_its_store_is_closed(three: Path) -> None:
    with TableStore(three, 1.0) as store:
        store.table("a.arrow", refuse)
        built(three, "b.arrow", refuse)
    with TableStore(three, limit_of(1, three)) as store:
        store.keep_limit()
    assert kept(three) == ["a.arrow"]


def test_keep_limit__what_the_store_uses_stays(
    three: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with TableStore(three, limit_of(1, three)) as store:
        for name in names("a", "b"):
            store.table(name, refuse)
        store.keep_limit()
        assert kept(three) == names("a", "b")
    assert "use all of them" in caplog.text
    caplog.clear()
    with TableStore(three, limit_of(1, three)) as store:
        store.keep_limit()
    assert len(kept(three)) == 1
    assert caplog.messages == []


def test_keep_limit__files_of_former_versions_and_of_others(three: Path) -> None:
    cache = three / "cache"
    (cache / "features-old.arrow").write_bytes(b"no seal, no lock")
    os.utime(cache / "features-old.arrow", (0, 0))
    (cache / "notes.txt").write_text("the user's")
    with TableStore(three, limit_of(3, three)) as store:
        store.keep_limit()
    assert kept(three) == names("a", "b", "c")
    assert (cache / "notes.txt").exists()


def test_has_room__beside_what_is_used_here(three: Path) -> None:
    size = (three / "cache" / "a.arrow").stat().st_size
    with TableStore(three, limit_of(3, three)) as store:
        assert store.has_room({"d.arrow": 3 * size})  # a, b and c would give way
        store.table("a.arrow", refuse)
        assert store.has_room({"d.arrow": size, "e.arrow": size})
        assert not store.has_room({"d.arrow": size, "e.arrow": size + 1})
        assert store.has_room({"a.arrow": size, "d.arrow": 2 * size})  # a is counted once
