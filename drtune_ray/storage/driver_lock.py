"""The lock of a study's driver: taking it, and reading who holds it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.folders import open_folder
from drtune_ray.processes import is_alive
from drtune_ray.storage.lease import LEASE_NAME, this_machine
from drtune_ray.storage.record import Record

LOCK_NAME, HOLDER_NAME = "driver.lock", "driver.txt"
LOCKS_FILE = Path("/proc/locks")


def driver_of(record: Record, notes: list[str]) -> tuple[str | None, bool | None]:
    """Return who drives a study or training, or did last, and whether that process is alive.

    Args:
        record: The study or training.
        notes: List that receives a sentence for what could not be determined.

    Returns:
        Process and host, or None if unknown; whether it is alive, or None if it is on another
        host.
    """
    text = _text(record.folder / HOLDER_NAME)
    pid, host = _process_and_host(text)
    is_elsewhere = host not in (None, socket.gethostname())
    if host and not is_elsewhere and _holds(pid, record.folder / LOCK_NAME):
        return text, True
    local = text or None, None if is_elsewhere else False
    return _driver_in_artifacts(record, notes, local) if record.artifacts else local


def _driver_in_artifacts(
    record: Record, notes: list[str], local: tuple[str | None, bool | None]
) -> tuple[str | None, bool | None]:
    """Return the holder of the lease in the artifacts, which a driver removes when it ends."""
    try:
        lease = open_folder(str(record.artifacts)).below(record.folder.name).read(LEASE_NAME)
        holder = json.loads(lease)
        pid, host = int(holder["pid"]), str(holder["host"])
    except FileNotFoundError:
        return local[0], False
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"artifacts={record.artifacts!r} cannot be read: {error}")
        return local
    is_here = (host, holder.get("machine")) == (socket.gethostname(), this_machine())
    return f"process {pid} on {host}", is_alive(pid) if is_here else None


def _process_and_host(text: str) -> tuple[int, str | None]:
    """Parse "process 12 on host-a"."""
    words = text.split()
    is_known = len(words) == 4 and words[1].isdigit()
    return (int(words[1]), words[3]) if is_known else (0, None)


def _holds(pid: int, lock: Path) -> bool:
    """Return whether a process of this machine holds the lock, without touching the lock.

    The process number may have been reused; the kernel's list of locks tells.
    """
    if not LOCKS_FILE.exists():
        return is_alive(pid)
    try:
        inode = str(lock.stat().st_ino)
    except OSError:
        return False
    # "1: FLOCK  ADVISORY  WRITE 11276 fe:00:2187738 0 EOF"
    held = (line.split() for line in LOCKS_FILE.read_text().splitlines())
    return any(words[4] == str(pid) and words[5].split(":")[-1] == inode for words in held)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


@contextmanager
def driver_lock(folder: Path) -> Iterator[None]:
    """Hold the lock that makes this process the study's only driver on this machine.

    Raises:
        EnvironmentProblem: If another process holds it; names the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder_file = folder / HOLDER_NAME
    # The operating system releases the lock of a killed driver.
    lock = filelock.FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        holder = _text(holder_file) or "another process"
        raise EnvironmentProblem(
            f"study {folder.name!r} is being run by {holder}: wait for it or end it first"
        ) from None
    try:
        holder_file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()
