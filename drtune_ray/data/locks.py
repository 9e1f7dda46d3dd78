"""Locks between processes that the operating system releases when their holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXCLUSIVE, SHARED = fcntl.LOCK_EX, fcntl.LOCK_SH
EXCLUSIVE_AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB


@contextmanager
def flocked(path: Path, kind: int) -> Iterator[bool]:
    """Hold a lock on a file, which an exclusive holder may remove.

    Args:
        path: The lock file; created if missing.
        kind: `EXCLUSIVE` and `SHARED` wait for other holders, `EXCLUSIVE_AT_ONCE` does not.

    Yields:
        Whether the lock is held: False only if `EXCLUSIVE_AT_ONCE` found another holder.
    """
    descriptor = _acquire(path, kind)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # Closing alone would leave the lock with processes forked in the meantime.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _acquire(path: Path, kind: int) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, kind)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:  # such as an interrupted wait
            os.close(descriptor)
            raise
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the file was neither removed nor replaced while waiting for its lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
