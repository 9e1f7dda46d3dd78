"""Events are written to disk first, then sent to a server by one background writer.

A study never waits for its tracking server and never fails because of it: unsent events stay in
the spool, and sending an event twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import IO, Protocol

from drtune_ray.folders import atomic_write
from drtune_ray.tracking.events import Event, from_plain, to_plain

logger = logging.getLogger(__name__)

EVENTS_NAME, SENT_NAME = "events.jsonl", "sent"
RETRY_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
CLOSING_RETRY_SECONDS = 0.5
CLOSING_POLL_SECONDS = 0.1
MAX_CLOSING_SECONDS = 120.0


class Recorder(Protocol):
    """A destination of events; recording the same event twice must change nothing."""

    def record(self, event: Event) -> None:
        """Record one event, or raise."""


class Spool:
    """Append-only file of events, with the position up to which they were sent.

    Args:
        folder: Folder of both files; created if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._events, self._sent = folder / EVENTS_NAME, folder / SENT_NAME
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()

    def append(self, event: Event) -> None:
        """Append an event and flush it to disk."""
        line = json.dumps(to_plain(event)) + "\n"
        with self._lock, self._events.open("a+b") as file:
            drop_torn_end(file)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def next_unsent(self) -> tuple[Event, int] | None:
        """Return the oldest unsent event and the position after it, or None."""
        if not self._events.exists():
            return None
        with self._events.open("rb") as file:
            file.seek(self.position)
            line = file.readline()
            if not line.endswith(b"\n"):
                return None
            return from_plain(json.loads(line)), file.tell()

    def mark_sent(self, offset: int) -> None:
        """Record that everything before the position was sent."""
        atomic_write(self._sent, lambda path: path.write_text(str(offset)), is_durable=False)

    def num_unsent(self) -> int:
        """Return the number of unsent events."""
        if not self._events.exists():
            return 0
        with self._events.open("rb") as file:
            file.seek(self.position)
            return sum(line.endswith(b"\n") for line in file)

    def unsent(self) -> bytes:
        """Return the unsent events, for :meth:`restore` of another spool."""
        if not self._events.exists():
            return b""
        with self._events.open("rb") as file:
            file.seek(self.position)
            return file.read()

    def restore(self, unsent: bytes) -> None:
        """Start with the unsent events of a spool that was lost."""
        self._events.write_bytes(unsent)

    @property
    def position(self) -> int:
        """Position up to which the file was sent, in bytes."""
        # A power cut may leave the file empty; sending everything again changes nothing.
        text = self._sent.read_text() if self._sent.exists() else ""
        return int(text or 0)


def drop_torn_end(file: IO[bytes]) -> None:
    """Remove an incomplete last line, left by a crash or a full disk."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


class BackgroundWriter:
    """Sends a spool's events from a thread of its own, in order, until closed.

    Args:
        spool: Events to send.
        recorder: Their destination; used only from the writer's thread.

    Attributes:
        disk_error: Error of the latest event that could not be written to disk and was lost.
    """

    def __init__(self, spool: Spool, recorder: Recorder) -> None:
        self._spool, self._recorder = spool, recorder
        self._wake, self._closing = threading.Event(), threading.Event()
        self._has_warned = False
        self.disk_error: OSError | None = None
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def emit(self, event: Event) -> None:
        """Write an event to disk, to be sent later."""
        try:
            self._spool.append(event)
        except OSError as error:
            if self.disk_error is None:
                logger.warning("tracking: an event could not be written to disk: %s", error)
            self.disk_error = error
        self._wake.set()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        # After an interruption, a user or a job server does not wait for minutes.
        self.close(max_seconds=MAX_CLOSING_SECONDS if kind is None else 0.0)

    def close(self, timeout_seconds: float = 15.0, max_seconds: float = MAX_CLOSING_SECONDS) -> int:
        """Send the remaining events; return how many stay unsent.

        Args:
            timeout_seconds: Maximum time per event. A slow server receives all events; one that
                is unreachable or hangs delays the end by this time only.
            max_seconds: Maximum total time, if larger than `timeout_seconds`.
        """
        if not self._closing.is_set():
            started, sent = time.monotonic(), self._spool.position
            self._deadline = started + timeout_seconds
            latest = max(self._deadline, started + max_seconds)
            self._closing.set()
            self._wake.set()
            while self._thread.is_alive() and not self._is_too_late():
                self._thread.join(CLOSING_POLL_SECONDS)
                if self._spool.position > sent:
                    sent = self._spool.position
                    self._deadline = min(time.monotonic() + timeout_seconds, latest)
        return self._spool.num_unsent()

    def _run(self) -> None:
        num_failures = 0
        while True:
            self._wake.clear()
            try:
                if send_unsent(self._spool, self._recorder):
                    num_failures = 0
            except Exception as error:  # any failure of an observer; the study continues
                self._warn_once(error)
                if self._is_too_late():
                    return
                self._wait(RETRY_SECONDS[min(num_failures, len(RETRY_SECONDS) - 1)])
                num_failures += 1
                continue
            if self._closing.is_set() and self._spool.next_unsent() is None:
                return
            self._wake.wait()

    def _wait(self, seconds: float) -> None:
        """Wait before the next attempt; shorter once the writer is closing."""
        if self._closing.wait(seconds):
            time.sleep(CLOSING_RETRY_SECONDS)

    def _is_too_late(self) -> bool:
        return self._closing.is_set() and time.monotonic() >= self._deadline

    def _warn_once(self, error: Exception) -> None:
        if not self._has_warned:
            logger.warning(
                "tracking: %s; events are kept on disk and sent once the server can be reached",
                error,
            )
            self._has_warned = True


def send_unsent(spool: Spool, recorder: Recorder) -> int:
    """Send every unsent event; return their number.

    Raises:
        Exception: Any error of the recorder; the event that caused it stays unsent.
    """
    num_sent = 0
    while (unsent := spool.next_unsent()) is not None:
        event, offset = unsent
        recorder.record(event)
        spool.mark_sent(offset)
        num_sent += 1
    return num_sent
