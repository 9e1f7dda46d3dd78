"""Events are written to disk first, then sent to a server by one background writer.

A study never waits for its tracking server and never fails because of it: unsent events stay in
the spool, and sending an event twice changes nothing. Files have a queue of their own, so that an
artifact store that refuses them holds back no metric.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.folders import append_line, atomic_write
from drtune_ray.tracking.events import Event, FilesReady, from_plain, to_plain

logger = logging.getLogger(__name__)

EVENTS_NAME, SENT_NAME = "events.jsonl", "sent"
FILES_NAME, FILES_SENT_NAME = "files.jsonl", "files-sent"
RETRY_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
CLOSING_RETRY_SECONDS = 0.5
CLOSING_POLL_SECONDS = 0.1
MAX_CLOSING_SECONDS = 120.0


class Recorder(Protocol):
    """A destination of events; recording the same event twice must change nothing."""

    def record(self, event: Event) -> None:
        """Record one event, or raise."""

    def lacks_study(self) -> bool:
        """Return whether it holds nothing of the study, so that all events must be sent again."""


class Queue:
    """Append-only file of events, with the position up to which they were sent.

    A line that cannot be read is left out and stays in the file.

    Args:
        path: The file.
        sent: File with the position.
        root: Folder that paths of files are relative to, so that it can be moved and copied.
    """

    def __init__(self, path: Path, sent: Path, root: Path) -> None:
        self.path, self._sent, self._root = path, sent, root
        self._lock = threading.Lock()

    def append(self, event: Event) -> None:
        """Append an event and flush it to disk."""
        if isinstance(event, FilesReady) and Path(event.path).is_relative_to(self._root):
            event = replace(event, path=str(Path(event.path).relative_to(self._root)))
        with self._lock:
            append_line(self.path, json.dumps(to_plain(event)).encode())

    def next_unsent(self) -> tuple[Event, int] | None:
        """Return the oldest unsent event and the position after it, or None."""
        return next(self._events(self.position), None)

    def events(self, *kinds: str) -> Iterator[Event]:
        """Yield all events, oldest first; if kinds are given, only theirs."""
        starts = tuple(json.dumps({"kind": kind})[:-1].encode() for kind in kinds)
        lines = (line for line, _ in self._lines(0) if not kinds or line.startswith(starts))
        return (event for event in map(self._parsed, lines) if event is not None)

    def mark_sent(self, offset: int) -> None:
        """Record that everything before the position was sent."""
        atomic_write(self._sent, lambda path: path.write_text(str(offset)), is_durable=False)

    def num_unsent(self) -> int:
        """Return the number of unsent events."""
        return sum(1 for _ in self._events(self.position))

    def damaged(self) -> list[str]:
        """Return file and line of each unsent line that cannot be read."""
        lines = self._lines(self.position)
        ends = {end for line, end in lines if self._parsed(line) is None}
        numbered = enumerate(self._lines(0), 1) if ends else ()
        return [f"{self.path}:{number}" for number, (_, end) in numbered if end in ends]

    def unsent(self) -> bytes:
        """Return the unsent lines."""
        return b"".join(line for line, _ in self._lines(self.position))

    @property
    def position(self) -> int:
        """Position up to which the file was sent, in bytes."""
        # Sending everything again changes nothing: a mark that is wrong counts as none.
        try:
            position = int(self._sent.read_text() or 0)
            return position if self._is_start_of_line(position) else 0
        except (FileNotFoundError, ValueError):
            return 0

    def _is_start_of_line(self, position: int) -> bool:
        if position <= 0:
            return position == 0
        with self.path.open("rb") as file:
            file.seek(position - 1)
            return file.read(1) == b"\n"

    def _events(self, position: int) -> Iterator[tuple[Event, int]]:
        for line, end in self._lines(position):
            if (event := self._parsed(line)) is not None:
                yield event, end

    def _lines(self, position: int) -> Iterator[tuple[bytes, int]]:
        """Yield the complete lines from a position on, and where they end."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(position)
            for line in file:
                position += len(line)
                if line.endswith(b"\n"):
                    yield line, position

    def _parsed(self, line: bytes) -> Event | None:
        """Return the event of a line, None if the line is damaged."""
        try:
            event = from_plain(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        if isinstance(event, FilesReady):
            return replace(event, path=str(self._root / event.path))
        return event


class Spool:
    """The events of a study, and the files that they name, each in a queue.

    Args:
        folder: Folder of the queues in the study's folder; created if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.events = Queue(folder / EVENTS_NAME, folder / SENT_NAME, folder.parent)
        self.files = Queue(folder / FILES_NAME, folder / FILES_SENT_NAME, folder.parent)
        self.queues = (self.events, self.files)
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, event: Event) -> None:
        """Append an event to its queue and flush it to disk."""
        (self.files if isinstance(event, FilesReady) else self.events).append(event)

    def num_unsent(self) -> int:
        """Return the number of unsent events."""
        return sum(queue.num_unsent() for queue in self.queues)

    def damaged(self) -> list[str]:
        """Return file and line of each unsent line that cannot be read."""
        return [place for queue in self.queues for place in queue.damaged()]

    def unsent(self) -> bytes:
        """Return the unsent lines, for :meth:`restore` of another spool."""
        return b"".join(queue.unsent() for queue in self.queues)

    def restore(self, unsent: bytes) -> None:
        """Start with the unsent lines of a spool that was lost."""
        self.events.path.write_bytes(unsent)

    def rewind(self) -> None:
        """Send everything again."""
        for queue in self.queues:
            queue.mark_sent(0)

    @property
    def position(self) -> int:
        """Number of bytes that were sent."""
        return sum(queue.position for queue in self.queues)


class BackgroundWriter:
    """Sends a spool's events from a thread of its own, in order, until closed.

    Args:
        spool: Events to send.
        recorder: Their destination; used only from the writer's thread.

    Attributes:
        disk_error: Error of the latest event that could not be written to disk and was lost.
    """

    def __init__(self, spool: Spool, recorder: Recorder) -> None:
        self._spool = spool
        self._wake, self._closing = threading.Event(), threading.Event()
        self._senders = (
            _Sender(partial(send_events, spool, recorder), "events are kept on disk and sent"),
            _Sender(
                partial(send_files, spool, recorder),
                "metrics are recorded; files are kept on disk and sent",
            ),
        )
        self.disk_error: OSError | None = None
        self._deadline = float("inf")
        if damaged := spool.damaged():
            logger.warning("tracking: damaged, and therefore not sent: %s", ", ".join(damaged))
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
                if self._spool.position != sent:
                    sent = self._spool.position
                    self._deadline = min(time.monotonic() + timeout_seconds, latest)
        return self._spool.num_unsent()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            is_closing = self._closing.is_set()
            seconds = self._send(is_closing)
            if is_closing:
                if seconds == math.inf or self._is_too_late():
                    return
                time.sleep(CLOSING_RETRY_SECONDS)
            else:
                self._wake.wait(None if seconds == math.inf else seconds)

    def _send(self, is_closing: bool) -> float:
        """Send what can be sent; return the seconds until the next attempt is due."""
        for sender in self._senders:
            seconds = sender.attempt(is_closing)
            if seconds != math.inf:  # files follow the events of their runs
                return seconds
        return math.inf

    def _is_too_late(self) -> bool:
        return self._closing.is_set() and time.monotonic() >= self._deadline


class _Sender:
    """Sends one queue, with pauses after failures.

    Args:
        send: Sends all that is unsent and returns its number, or raises.
        consequence: What happens to the events meanwhile, for the one message about failures.
    """

    def __init__(self, send: Callable[[], int], consequence: str) -> None:
        self._send, self._consequence = send, consequence
        self._num_failures, self._due = 0, 0.0
        self._has_warned = self._is_refused = False

    def attempt(self, is_closing: bool) -> float:
        """Send all that is unsent, if it is time to.

        Returns:
            Seconds until the next attempt is due; infinity if none is needed or, when the writer
            closes, none can succeed.
        """
        if is_closing and self._is_refused:
            return math.inf
        seconds = self._due - time.monotonic()
        if seconds > 0 and not is_closing:
            return seconds
        try:
            if self._send():
                self._num_failures = 0
        except Exception as error:  # any failure of an observer; the study continues
            return self._pause(error, is_closing)
        return math.inf

    def _pause(self, error: Exception, is_closing: bool) -> float:
        # Such as a deleted experiment: only a person can bring it back.
        self._is_refused = isinstance(error, EnvironmentProblem)
        if not self._has_warned:
            when = "by `drtune-ray sync`" if self._is_refused else "once the server can be reached"
            logger.warning("tracking: %s; %s %s", error, self._consequence, when)
            self._has_warned = True
        index = -1 if self._is_refused else min(self._num_failures, len(RETRY_SECONDS) - 1)
        self._num_failures += 1
        self._due = time.monotonic() + RETRY_SECONDS[index]
        return math.inf if is_closing and self._is_refused else RETRY_SECONDS[index]


def send_rest(spool: Spool, recorder: Recorder) -> int:
    """Send what an earlier run left unsent; return how many events stay unsent."""
    return BackgroundWriter(spool, recorder).close() if spool.num_unsent() else 0


def send_events(spool: Spool, recorder: Recorder) -> int:
    """Send every unsent event, or all of them if the recorder lost the study; return their number.

    Raises:
        Exception: Any error of the recorder; the event that caused it stays unsent.
    """
    if spool.position > 0 and recorder.lacks_study():
        logger.warning("tracking: the study is no longer in MLflow: all its events are sent again")
        spool.rewind()
    return _send(spool, spool.events, recorder)


def send_files(spool: Spool, recorder: Recorder) -> int:
    """Send every unsent file; return their number.

    Raises:
        Exception: Any error of the recorder; the file that caused it stays unsent.
    """
    return _send(spool, spool.files, recorder)


def _send(spool: Spool, queue: Queue, recorder: Recorder) -> int:
    num_sent = 0
    while (unsent := queue.next_unsent()) is not None:
        event, offset = unsent
        if isinstance(event, FilesReady) and queue is not spool.files:
            spool.append(event)  # of an earlier version, or restored
        else:
            recorder.record(event)
        queue.mark_sent(offset)
        num_sent += 1
    return num_sent
