"""The tables of a storage: found sound or built anew, by one process, and kept under a limit.

Beside each table lies its seal: name, size and checksum. A table has two locks in ``.locks``:
``build`` is held by the one process that verifies or builds it, ``use`` is shared by the drivers
that need it, as long as they run. Removing a table takes both.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import pyarrow as pa

from drtune_ray.data.cache import read_table
from drtune_ray.data.locks import EXCLUSIVE, EXCLUSIVE_AT_ONCE, SHARED, flocked

logger = logging.getLogger(__name__)
CACHE_FOLDER, LOCKS_FOLDER = "cache", ".locks"
ARROW_SUFFIX = ".arrow"
TABLE_SUFFIXES = frozenset({ARROW_SUFFIX, ".safetensors"})
CHUNK_BYTES = 2**20


class Shelf(Protocol):
    """Where tables lie that several nodes use; see `drtune_ray.data.remote_tables`."""

    def fetch(self, name: str, path: Path) -> bool:
        """Copy the table of this name to a path; whether it was there, and sound."""

    def put(self, path: Path) -> None:
        """Take a table, unless it is there."""


class TableStore:
    """The cache folder of a storage, and the tables that this process uses of it while open.

    Args:
        storage: The folder that all studies share; the tables lie in its ``cache``.
        limit_gib: What the tables may take together, unless more of them are in use.
        shelf: Holds the tables for other nodes too: what is there is not built again.
    """

    def __init__(self, storage: Path, limit_gib: float, shelf: Shelf | None = None) -> None:
        self.storage, self.folder = storage, storage / CACHE_FOLDER
        self._locks = self.folder / LOCKS_FOLDER
        self._limit_bytes = limit_gib * 2**30
        self._shelf = shelf
        self._used: set[str] = set()
        self._uses = ExitStack()

    def __enter__(self) -> Self:
        self._locks.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name in self._used:
            self._touch(name)
        self._used.clear()
        self._uses.close()

    def table(self, name: str, write: Callable[[Path], None]) -> Path:
        """A sound table, which stays where it is until the store is closed.

        It is verified when this store first asks for it. A process that finds another one
        building it waits and then uses what that one built.

        Args:
            name: Its file name, which follows from all that decides its content.
            write: Writes it to a path if there is none, or the one that is there is damaged.
        """
        path = self.folder / name
        if name in self._used:
            return path
        with flocked(self._build_lock(name), EXCLUSIVE):
            if not self._is_sound(path):
                self._build(path, self._fetched_or(write, name))
            # Before the other lock is let go, so that nobody removes the table in between.
            self._uses.enter_context(flocked(self._use_lock(name), SHARED))
        self._used.add(name)
        self._touch(name)
        if self._shelf is not None:
            self._shelf.put(path)
        return path

    def has_room(self, sizes: Mapping[str, int]) -> bool:
        """Whether tables of so many bytes fit under the limit beside those used here already."""
        used = sum(_num_bytes(self.folder / name) for name in self._used)
        more = sum(size for name, size in sizes.items() if name not in self._used)
        return used + more <= self._limit_bytes

    def keep_limit(self) -> None:
        """Remove tables that nobody uses, least recently used first, until the rest fits."""
        sizes = {name: _num_bytes(self.folder / name) for name in self._names()}
        total = sum(sizes.values())
        for name in sorted(sizes.keys() - self._used, key=self._last_use):
            is_gone = not (self.folder / name).exists()  # what a killed builder left
            if (is_gone or total > self._limit_bytes) and self._remove(name):
                total -= sizes[name]
        if total > self._limit_bytes:
            logger.warning(
                "the tables in %s take %.2f GiB, more than data.cache_limit_gib=%g: studies that "
                "are running use all of them",
                self.folder,
                total / 2**30,
                self._limit_bytes / 2**30,
            )

    def _fetched_or(self, write: Callable[[Path], None], name: str) -> Callable[[Path], None]:
        shelf = self._shelf
        if shelf is None:
            return write
        return lambda path: None if shelf.fetch(name, path) else write(path)

    def _is_sound(self, path: Path) -> bool:
        if not path.exists():
            return False
        problem = damage(path)
        if problem:
            logger.warning("%s %s: it is removed and built again", path, problem)
        return problem is None

    def _build(self, path: Path, write: Callable[[Path], None]) -> None:
        """Write a table and its seal aside, then put them into their places, the seal first."""
        for former in (path, seal_of(path)):
            former.unlink(missing_ok=True)
        aside = self._aside(path.name)
        shutil.rmtree(aside, ignore_errors=True)  # a killed builder's
        aside.mkdir()
        try:
            written = aside / path.name
            write(written)
            seal(written)
            for name in (seal_of(path).name, path.name):
                os.replace(aside / name, self.folder / name)
        finally:
            shutil.rmtree(aside)

    def _remove(self, name: str) -> bool:
        """Remove all that belongs to a table, unless it is being built or used."""
        use, build = self._use_lock(name), self._build_lock(name)
        with (
            flocked(use, EXCLUSIVE_AT_ONCE) as is_unused,
            flocked(build, EXCLUSIVE_AT_ONCE) as is_idle,
        ):
            if not (is_unused and is_idle):
                return False
            shutil.rmtree(self._aside(name), ignore_errors=True)
            # The build lock last: whoever waits for it shall find the rest done.
            for path in (self.folder / name, seal_of(self.folder / name), use, build):
                path.unlink(missing_ok=True)
        return True

    def _names(self) -> set[str]:
        """Of all tables that lie here or were begun here."""
        begun = {path.stem for path in self._locks.iterdir()}
        return begun | {p.name for p in self.folder.iterdir() if p.suffix in TABLE_SUFFIXES}

    def _last_use(self, name: str) -> int:
        """Nanoseconds; the seal keeps the time."""
        for path in (seal_of(self.folder / name), self.folder / name):
            with suppress(FileNotFoundError):
                return path.stat().st_mtime_ns
        return 0

    def _touch(self, name: str) -> None:
        now = time.time_ns()  # the file system's own clock ticks in milliseconds
        with suppress(FileNotFoundError):  # removed by hand: found at the next start
            os.utime(seal_of(self.folder / name), ns=(now, now))

    def _aside(self, name: str) -> Path:
        return self.folder / f".{name}.building"

    def _build_lock(self, name: str) -> Path:
        return self._locks / f"{name}.build"

    def _use_lock(self, name: str) -> Path:
        return self._locks / f"{name}.use"


def seal(path: Path) -> None:
    """Write a table's seal beside it."""
    seal_of(path).write_text(json.dumps(_content(path)))


def seal_of(path: Path) -> Path:
    """Where the seal of a table lies."""
    return path.with_name(f"{path.name}.seal")


def damage(path: Path) -> str | None:
    """What is wrong with a table that is there; None where it is sound."""
    try:
        expected = json.loads(seal_of(path).read_text())
    except (OSError, ValueError):
        return "has no readable seal"
    num_bytes = path.stat().st_size
    if not isinstance(expected, dict) or expected.get("num_bytes") != num_bytes:
        return f"has {num_bytes} bytes, which is not what its seal says"
    try:
        if expected != _content(path):
            return "is not what its seal says"
        if path.suffix == ARROW_SUFFIX:
            read_table(path)
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read ({error})"
    return None


def _content(path: Path) -> dict[str, Any]:
    """What a seal says. The name is in it so that another table's file is seen to be foreign."""
    checksum, num_bytes = 0, 0
    with path.open("rb") as file:
        # CRC-32 finds every damage that is not made on purpose, several times faster than SHA-2.
        while chunk := file.read(CHUNK_BYTES):
            checksum, num_bytes = zlib.crc32(chunk, checksum), num_bytes + len(chunk)
    return {"table": path.name, "num_bytes": num_bytes, "crc32": checksum}


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
