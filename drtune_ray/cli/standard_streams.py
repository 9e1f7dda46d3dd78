"""Standard output and error that may fail: what a command shows is not what it does.

A reader that goes away (``| head``), a full disk under a log, or a stream that the caller has
closed (``>&-``) must not end a study that trains for hours.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO


def tolerate_failing_streams() -> None:
    """Have writes to stdout and stderr of this process never raise; say the first failure once."""
    _open_missing_descriptors()
    # Others may have replaced them: a test, or a notebook.
    if sys.stderr is sys.__stderr__:
        sys.stderr = _tolerant(sys.stderr, 2, None)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _tolerant(sys.stdout, 1, sys.stderr)


def _open_missing_descriptors() -> None:
    """Open /dev/null where a standard descriptor is closed.

    The next file that is opened, a database perhaps, would otherwise take its number and receive
    what other processes print.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)


def _tolerant(stream: TextIO | None, descriptor: int, told: TextIO | None) -> Any:
    return io.TextIOWrapper(
        io.BufferedWriter(_TolerantFile(descriptor, told)),
        encoding=stream.encoding if stream else "utf-8",
        errors=stream.errors if stream else "backslashreplace",
        line_buffering=True,
    )


class _TolerantFile(io.FileIO):
    """A file whose failing writes are dropped.

    Args:
        descriptor: Number of an open file, which stays open.
        told: Stream for one line about the first failure; None says nothing.
    """

    def __init__(self, descriptor: int, told: TextIO | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._told = told

    def write(self, data: Any, /) -> int:
        """Write what can be written, and drop the rest."""
        try:
            written = super().write(data)
        except OSError as error:
            self._tell(error)
            return memoryview(data).nbytes
        return memoryview(data).nbytes if written is None else written

    def _tell(self, error: OSError) -> None:
        if self._told is not None:
            told, self._told = self._told, None
            with contextlib.suppress(OSError, ValueError):
                told.write(
                    f"drtune-ray: the output cannot be written any more ({error.strerror}); the "
                    "command continues without it\n"
                )
                told.flush()
