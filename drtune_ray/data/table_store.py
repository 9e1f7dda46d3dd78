"""The tables of a storage: verified or rebuilt by one process, and kept under a limit.

Each table has a seal next to it: name, size and checksum. Each has two locks in ``.locks``:
``build`` is held by the one process that verifies or builds it, ``use`` is shared by the drivers
that need it, as long as they run. Removing a table needs both.
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
    """A place for tables that several nodes use; see `drtune_ray.data.remote_tables`."""

    def fetch(self, name: str, path: Path) -> bool:
        """Copy a table to a path; return whether it existed and was sound."""

    def put(self, path: Path) -> None:
        """Upload a table unless it exists."""


class TableStore:
    """The cache folder of a storage; tables that this process uses stay locked while it is open.

    Args:
        storage: Folder that all studies share; the tables are in its ``cache``.
        limit_gib: Maximum total size of the tables in GiB, exceeded only by tables in use.
        shelf: Copies of the tables for other nodes; a table found there is not rebuilt.
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
        """Return the path of a sound table, which is not removed until the store is closed.

        The table is verified on the first call. If another process is building it, the call waits
        and uses that process's table.

        Args:
            name: File name, which contains a hash of everything that decides the content.
            write: Writes the table to a path; called if it is missing or damaged.
        """
        path = self.folder / name
        if name in self._used:
            return path
        with flocked(self._build_lock(name), EXCLUSIVE):
            if not self._is_sound(path):
                self._build(path, self._fetched_or(write, name))
            # Taken before the build lock is released, so that no process removes the table.
            self._uses.enter_context(flocked(self._use_lock(name), SHARED))
        self._used.add(name)
        self._touch(name)
        if self._shelf is not None:
            self._shelf.put(path)
        return path

    def has_room(self, sizes: Mapping[str, int]) -> bool:
        """Return whether tables of these sizes fit under the limit beside those in use here."""
        used = sum(_num_bytes(self.folder / name) for name in self._used)
        more = sum(size for name, size in sizes.items() if name not in self._used)
        return used + more <= self._limit_bytes

    def keep_limit(self) -> None:
        """Remove unused tables, least recently used first, until the rest fits under the limit."""
        sizes = {name: _num_bytes(self.folder / name) for name in self._names()}
        total = sum(sizes.values())
        for name in sorted(sizes.keys() - self._used, key=self._last_use):
            is_gone = not (self.folder / name).exists()  # left by a killed builder
            if (is_gone or total > self._limit_bytes) and self._remove(name):
                total -= sizes[name]
        if total > self._limit_bytes:
            logger.warning(
                "the tables in %s take %.2f GiB, more than data.cache_limit_gib=%g: running "
                "studies use all of them",
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
            logger.warning("%s %s: removing and rebuilding it", path, problem)
        return problem is None

    def _build(self, path: Path, write: Callable[[Path], None]) -> None:
        """Write a table and its seal to a temporary folder, then publish them, the seal first."""
        for former in (path, seal_of(path)):
            former.unlink(missing_ok=True)
        aside = self._aside(path.name)
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed builder
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
        """Remove a table unless it is being built or used; return whether it was removed."""
        use, build = self._use_lock(name), self._build_lock(name)
        with (
            flocked(use, EXCLUSIVE_AT_ONCE) as is_unused,
            flocked(build, EXCLUSIVE_AT_ONCE) as is_idle,
        ):
            if not (is_unused and is_idle):
                return False
            shutil.rmtree(self._aside(name), ignore_errors=True)
            # The build lock last, so that a process waiting for it finds the rest removed.
            for path in (self.folder / name, seal_of(self.folder / name), use, build):
                path.unlink(missing_ok=True)
        return True

    def _names(self) -> set[str]:
        """Return the names of all tables here, including those whose build was not finished."""
        started = {path.stem for path in self._locks.iterdir()}
        return started | {p.name for p in self.folder.iterdir() if p.suffix in TABLE_SUFFIXES}

    def _last_use(self, name: str) -> int:
        """Return the time of the last use in nanoseconds, which is the seal's modification time."""
        for path in (seal_of(self.folder / name), self.folder / name):
            with suppress(FileNotFoundError):
                return path.stat().st_mtime_ns
        return 0

    def _touch(self, name: str) -> None:
        now = time.time_ns()  # the file system's own clock has a resolution of milliseconds
        with suppress(FileNotFoundError):  # removed by hand; rebuilt at the next start
            os.utime(seal_of(self.folder / name), ns=(now, now))

    def _aside(self, name: str) -> Path:
        return self.folder / f".{name}.building"

    def _build_lock(self, name: str) -> Path:
        return self._locks / f"{name}.build"

    def _use_lock(self, name: str) -> Path:
        return self._locks / f"{name}.use"


def seal(path: Path) -> None:
    """Write the seal of a table next to it."""
    seal_of(path).write_text(json.dumps(_content(path)))


def seal_of(path: Path) -> Path:
    """Return the path of a table's seal."""
    return path.with_name(f"{path.name}.seal")


def damage(path: Path) -> str | None:
    """Return what is wrong with an existing table, None if it is sound."""
    try:
        expected = json.loads(seal_of(path).read_text())
    except (OSError, ValueError):
        return "has no readable seal"
    num_bytes = path.stat().st_size
    if not isinstance(expected, dict) or expected.get("num_bytes") != num_bytes:
        return f"has {num_bytes} bytes, but its seal records another size"
    try:
        if expected != _content(path):
            return "does not match its seal"
        if path.suffix == ARROW_SUFFIX:
            read_table(path)
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read ({error})"
    return None


def _content(path: Path) -> dict[str, Any]:
    """Return the content of a table's seal, with the name, so that a misplaced file is found."""
    checksum, num_bytes = 0, 0
    with path.open("rb") as file:
        # CRC-32 detects accidental damage several times faster than SHA-2.
        while chunk := file.read(CHUNK_BYTES):
            checksum, num_bytes = zlib.crc32(chunk, checksum), num_bytes + len(chunk)
    return {"table": path.name, "num_bytes": num_bytes, "crc32": checksum}


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
