"""Named files in a local folder or under a prefix of an object store.

Every write is atomic: readers see a complete file or none. An object store publishes an object
only when it is complete; on a file system a temporary file is renamed.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import unquote, urlsplit

from drtune_ray.errors import ConfigError, EnvironmentProblem, first_line
from drtune_ray.server_uri import secrets_hidden, with_secrets, without_password
from drtune_ray.values import full_path

Content = bytes | memoryview
OBJECT_STORES = ("s3", "gs", "gcs", "abfs", "abfss")
LEFTOVERS = ".*.tmp"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class Folder(Protocol):
    """Files by name. A missing file raises `FileNotFoundError`, any other failure `OSError`."""

    def write(self, name: str, *parts: Content) -> None:
        """Write the concatenated parts to the file, replacing it."""

    def read(self, name: str) -> bytes:
        """Return the content of the file."""

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file into the folder."""

    def download(self, name: str, path: Path) -> None:
        """Copy a file to a local path, atomically."""

    def names(self) -> list[str]:
        """Return the sorted names of the files; empty if the folder does not exist."""

    def folders(self) -> list[str]:
        """Return the sorted names of the subfolders; empty if the folder does not exist."""

    def remove(self, name: str) -> None:
        """Remove the file if it exists."""

    def remove_leftovers(self) -> None:
        """Remove incomplete files of writers that were killed."""

    def below(self, name: str) -> Folder:
        """Return a subfolder."""

    def address(self, name: str) -> str:
        """Return the path or URI of a file, for messages."""


class LocalFolder:
    """A folder on a file system.

    Args:
        path: The folder; created by the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, *parts: Content) -> None:
        """Write, flush to disk and rename; a crash at any time leaves the former file intact."""

        def fill(temporary: Path) -> None:
            with temporary.open("xb") as file:
                file.writelines(parts)

        atomic_write(self.path / name, fill)

    def read(self, name: str) -> bytes:
        """Return the content of the file."""
        return (self.path / name).read_bytes()

    def upload(self, path: Path, name: str) -> None:
        """Copy a file into the folder."""
        atomic_write(self.path / name, lambda temporary: shutil.copyfile(path, temporary))

    def download(self, name: str, path: Path) -> None:
        """Copy a file out of the folder."""
        atomic_write(path, lambda temporary: shutil.copyfile(self.path / name, temporary))

    def names(self) -> list[str]:
        """Return the sorted names of the files."""
        if not self.path.is_dir():
            return []
        return sorted(p.name for p in self.path.iterdir() if p.is_file() and p.name[0] != ".")

    def folders(self) -> list[str]:
        """Return the sorted names of the subfolders."""
        if not self.path.is_dir():
            return []
        return sorted(p.name for p in self.path.iterdir() if p.is_dir())

    def remove(self, name: str) -> None:
        """Remove the file if it exists."""
        (self.path / name).unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove temporary files."""
        for path in self.path.glob(LEFTOVERS):
            path.unlink(missing_ok=True)

    def below(self, name: str) -> LocalFolder:
        """Return a subfolder."""
        return LocalFolder(self.path / name)

    def address(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.path / name)


class ObjectFolder:
    """A prefix of an object store, accessed through Arrow's file systems.

    Args:
        uri: URI for `pyarrow.fs.FileSystem.from_uri`. Credentials come from the environment.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._opened: tuple[Any, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the URI alone: each process opens its own connection."""
        return type(self), (self._uri,)

    def write(self, name: str, *parts: Content) -> None:
        """Write an object, which appears once it is complete."""
        # In one call: a failure between two calls would publish a partial object.
        with self._store() as (files, root):
            with files.open_output_stream(f"{root}/{name}") as stream:
                stream.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def read(self, name: str) -> bytes:
        """Return the content of the object."""
        with self._store() as (files, root), files.open_input_stream(f"{root}/{name}") as stream:
            content: bytes = stream.readall()
        return content

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file in chunks."""
        from pyarrow import fs

        with self._store() as (files, root):
            fs.copy_files(
                str(path),
                f"{root}/{name}",
                source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=files,
            )

    def download(self, name: str, path: Path) -> None:
        """Copy an object to a local path in chunks."""
        from pyarrow import fs

        def fill(temporary: Path) -> None:
            with self._store() as (files, root):
                fs.copy_files(
                    f"{root}/{name}",
                    str(temporary),
                    source_filesystem=files,
                    destination_filesystem=fs.LocalFileSystem(),
                )

        atomic_write(path, fill)

    def names(self) -> list[str]:
        """Return the sorted names of the objects directly below the prefix."""
        return sorted(info.base_name for info in self._infos() if info.is_file)

    def folders(self) -> list[str]:
        """Return the sorted names of the prefixes directly below this one."""
        return sorted(info.base_name for info in self._infos() if not info.is_file)

    def remove(self, name: str) -> None:
        """Remove the object if it exists."""
        with self._store() as (files, root), suppress(FileNotFoundError):
            files.delete_file(f"{root}/{name}")

    def remove_leftovers(self) -> None:
        """Do nothing: the store expires incomplete uploads by its own rule (docs/servers.md)."""

    def below(self, name: str) -> ObjectFolder:
        """Return a longer prefix."""
        address, question, options = self._uri.partition("?")
        return ObjectFolder(f"{address.rstrip('/')}/{name}{question}{options}")

    def address(self, name: str) -> str:
        """Return the URI of an object."""
        return f"{self._uri.partition('?')[0].rstrip('/')}/{name}"

    def _infos(self) -> list[Any]:
        from pyarrow import fs

        with self._store() as (files, root):
            found: list[Any] = files.get_file_info(fs.FileSelector(root, allow_not_found=True))
        return found

    @contextmanager
    def _store(self) -> Iterator[tuple[Any, str]]:
        """Yield the file system and the prefix in it; errors within show no password."""
        with secrets_hidden(self._uri):
            if self._opened is None:
                from pyarrow import fs

                files, root = fs.FileSystem.from_uri(with_secrets(self._uri))
                self._opened = files, root.rstrip("/")
            yield self._opened


def open_folder(uri: str) -> Folder:
    """Return the folder of a URI: ``file:///...``, or a prefix of an object store.

    Raises:
        ConfigError: If the URI is of another kind.
    """
    try:
        parts = urlsplit(without_password(uri))
    except ValueError as error:
        raise ConfigError(f"artifacts: {error}") from None
    if parts.scheme == "file" and parts.path.startswith("/") and not parts.netloc:
        return LocalFolder(Path(unquote(parts.path)))
    if parts.scheme in OBJECT_STORES and parts.netloc:
        return ObjectFolder(uri)
    raise ConfigError(
        f"artifacts={uri!r} is not valid: give file:///FOLDER, s3://BUCKET/PREFIX or "
        "gs://BUCKET/PREFIX"
    )


def is_object_uri(text: str) -> bool:
    """Return whether a text is the URI of a place in an object store."""
    return text.partition("://")[0] in OBJECT_STORES and "://" in text


def source_location(text: str) -> str:
    """Return a source of images as the full path of a file or folder, or as a URI.

    Raises:
        ConfigError: If it is not a valid path.
    """
    return text.rstrip("/") if is_object_uri(text) else str(full_path(text))


def check_folder(folder: Folder) -> None:
    """Check that a file can be written, read and removed.

    Raises:
        EnvironmentProblem: If not, with the reason.
    """
    name, problem = probe_folder(folder)
    if problem:
        raise EnvironmentProblem(
            f"artifacts: {folder.address(name)} {problem}: "
            "check the address, that the bucket or folder exists, and the credentials in the "
            "environment"
        )


def probe_folder(folder: Folder) -> tuple[str, str]:
    """Write, read and remove a file; return its name and the problem, "" if there is none."""
    name, content = f"probe-{uuid.uuid4().hex}", b"drtune-ray"
    try:
        folder.write(name, content)
        found = folder.read(name)
        folder.remove(name)
    except (OSError, ValueError) as error:
        return name, f"cannot be written, read and removed ({first_line(error)})"
    return name, "" if found == content else "returns other content than was written"


@contextmanager
def as_problem(uri: str | None) -> Iterator[None]:
    """Turn each `OSError` within into one message about the artifacts.

    Args:
        uri: Address to name in the message; None if there are no artifacts.

    Raises:
        EnvironmentProblem: Instead of `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(
            f"artifacts={uri!r} failed ({first_line(error)}): repeat the command once it can be "
            "reached again"
        ) from error


@contextmanager
def files_as_problem() -> Iterator[None]:
    """Turn errors of the files of a study into one message; also a decorator.

    Raises:
        EnvironmentProblem: Instead of an `OSError` that names its file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        if error.errno in FULL_DISK:
            raise EnvironmentProblem(
                f"{error.filename} cannot be written, since its disk is full: free space there"
            ) from error
        raise EnvironmentProblem(
            f"{error.filename} cannot be used ({error.strerror}): make it accessible, move it "
            "away if it is in the place of another file, or bring it back from a backup"
        ) from error


def atomic_write(path: Path, fill: Callable[[Path], object], *, is_durable: bool = True) -> None:
    """Write a file that readers see complete or not at all.

    Args:
        path: The file; missing parent folders are created.
        fill: Writes the content to the temporary path that it is given.
        is_durable: Whether the file must survive a power cut once this returns: file and folder
            are flushed to disk.

    Raises:
        OSError: If the file cannot be written; it names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        fill(temporary)
        if is_durable:
            flush(temporary)
        temporary.replace(path)
    except BaseException as error:  # such as a full disk, which the partial file would keep full
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    if is_durable:
        flush(path.parent)


def append_line(path: Path, line: bytes, *, is_durable: bool = True) -> None:
    """Append a line that is on disk once this returns; a failure leaves the lines before it alone.

    An incomplete last line, left by a crash, is removed first.

    Args:
        path: The file.
        line: The line.
        is_durable: False leaves it to the operating system when to write to the disk: the line
            outlives this process, but not a power cut.
    """
    with path.open("a+b", buffering=0) as file:
        drop_torn_end(file)
        with whole_or_taken_back(path):
            left = memoryview(line.rstrip(b"\n") + b"\n")
            while left:
                left = left[file.write(left) :]
            if is_durable:
                os.fsync(file.fileno())


@contextmanager
def whole_or_taken_back(path: Path) -> Iterator[None]:
    """Truncate a file to its present size if what is appended within fails, as on a full disk."""
    size = path.stat().st_size
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first error matters more
            os.truncate(path, size)
        raise


def drop_torn_end(file: IO[bytes]) -> None:
    """Remove an incomplete last line, left by a crash or a full disk."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
