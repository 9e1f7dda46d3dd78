"""Locks between processes that the operating system drops when their holder dies."""

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
    """Hold a lock file, which may be removed by whoever holds it exclusively.

    Args:
        path: The lock file; made if there is none.
        kind: `EXCLUSIVE` and `SHARED` wait for other holders, `EXCLUSIVE_AT_ONCE` does not.

    Yields:
        Whether it is held: False only where `EXCLUSIVE_AT_ONCE` met another holder.
    """
    descriptor = _acquire(path, kind)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # Closing alone would leave it to processes forked meanwhile.
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
        except BaseException:  # an interruption of the wait, most of all
            os.close(descriptor)
            raise
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file was neither removed nor replaced while its lock was waited for."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
