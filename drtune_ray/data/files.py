"""Files of a source of images: below a folder of this machine, or a prefix of an object store."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import fs

from drtune_ray.errors import first_line
from drtune_ray.folders import is_object_uri
from drtune_ray.server_uri import secrets_hidden, with_secrets

MAX_FILE_BYTES = 2**30  # of an encoded image, a list of images or a label


@dataclass(frozen=True)
class Stamp:
    """Size and time of a file; a file with the same stamp is not read again.

    Attributes:
        num_bytes: Size of the encoded image; None where it is known only once it is read.
        modified_ns: Time of the last change in nanoseconds.
    """

    num_bytes: int | None
    modified_ns: int


class Files(Protocol):
    """Files by name, relative to a root. Whatever fails raises `OSError` with a `strerror`."""

    def stamp(self, path: str) -> Stamp:
        """Return size and time of a regular file."""

    def read(self, path: str) -> bytes:
        """Return the content of a file of at most `MAX_FILE_BYTES`."""

    def open(self, path: str) -> Any:
        """Open a regular file for reading at any position."""

    def address(self, path: str) -> str:
        """Return the full path or URI of a file."""


class LocalFiles:
    """Files below a folder of this machine.

    Args:
        root: The folder. Names that are full paths are read as such.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def stamp(self, path: str) -> Stamp:
        """Return size and time of a regular file."""
        status = (self.root / path).stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for a writer
            raise OSError(0, "not a regular file")
        return Stamp(status.st_size, status.st_mtime_ns)

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        _check_size(self.stamp(path))
        with (self.root / path).open("rb") as file:
            return file.read(MAX_FILE_BYTES)

    def open(self, path: str) -> Any:
        """Map a file into memory."""
        self.stamp(path)
        return pa.memory_map(str(self.root / path))

    def address(self, path: str) -> str:
        """Return the full path of a file."""
        return str(self.root / path)


class StoreFiles:
    """Files below a prefix of an object store, read through Arrow's file systems.

    Args:
        uri: URI of the prefix. Credentials come from the environment.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def stamp(self, path: str) -> Stamp:
        """Return size and time of an object."""
        info = self._infos(f"{self._root}/{path}")[0]
        if info.type != fs.FileType.File:
            raise FileNotFoundError(2, "No such object")
        return Stamp(info.size, info.mtime_ns or 0)

    def read(self, path: str) -> bytes:
        """Return the content of an object."""
        _check_size(self.stamp(path))
        with _with_strerror(self._uri), self.open(path) as file:
            content: bytes = file.read()
        return content

    def open(self, path: str) -> Any:
        """Open an object for reading at any position."""
        with _with_strerror(self._uri):
            return self._store.open_input_file(f"{self._root}/{path}")

    def names(self) -> list[str]:
        """Return the sorted names of all objects below the prefix."""
        found = self._infos(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        return sorted(
            info.path.removeprefix(f"{self._root}/")
            for info in found
            if info.type == fs.FileType.File
        )

    def address(self, path: str) -> str:
        """Return the URI of an object."""
        return f"{self._uri.partition('?')[0].rstrip('/')}/{path}"

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        with _with_strerror(self._uri):
            store, root = fs.FileSystem.from_uri(with_secrets(self._uri))
            return store, root.rstrip("/")

    @property
    def _store(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    def _infos(self, what: Any) -> list[Any]:
        with _with_strerror(self._uri):
            found = self._store.get_file_info([what] if isinstance(what, str) else what)
        return list(found)


@contextmanager
def _with_strerror(uri: str) -> Iterator[None]:
    """Give the errors of Arrow within a `strerror` of one line, without secrets."""
    try:
        with secrets_hidden(uri):
            yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OSError(0, first_line(error)) from None


def files_below(location: str) -> Files:
    """Return the files below a folder or a prefix of an object store."""
    return StoreFiles(location) if is_object_uri(location) else LocalFiles(Path(location))


def _check_size(found: Stamp) -> None:
    if found.num_bytes is not None and found.num_bytes > MAX_FILE_BYTES:
        gib = 2**30
        raise OSError(
            0,
            f"{found.num_bytes / gib:.1f} GiB, but a file may take {MAX_FILE_BYTES / gib:g} GiB",
        )
