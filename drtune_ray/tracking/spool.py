"""Events are written to disk first; `tracking.writer` sends them to a server.

A line of the spool is an event with an id of its own and its time. The process that emits events
only hands them to the operating system; the writer waits for the disk before it sends one.

A study never waits for its tracking server and never fails because of it: unsent events stay in
the spool, and sending an event twice changes nothing. Files have a queue of their own, so that an
artifact store that refuses them holds back no metric.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from drtune_ray.folders import append_line, atomic_write, flush
from drtune_ray.tracking.events import Event, Metrics, WithFiles, from_plain, to_plain

EVENTS_NAME, SENT_NAME = "events.jsonl", "sent"
FILES_NAME, FILES_SENT_NAME = "files.jsonl", "files-sent"
# Bounds of the metrics that are sent together: a slow server must take them before it times out.
MAX_EVENTS_TOGETHER, MAX_BYTES_TOGETHER = 50, 2**18


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
        self._flushed = 0

    def append(self, event: Event) -> None:
        """Append an event, which then outlives this process."""
        if isinstance(event, WithFiles) and Path(event.path).is_relative_to(self._root):
            event = replace(event, path=str(Path(event.path).relative_to(self._root)))
        plain = to_plain(event)
        line = {"kind": plain.pop("kind"), "id": uuid.uuid4().hex, **plain}
        with self._lock:
            append_line(self.path, json.dumps(line).encode(), is_durable=False)

    def flush(self, offset: int) -> None:
        """Wait until the disk holds the file up to a position."""
        if offset > self._flushed:
            size = self.path.stat().st_size
            flush(self.path)
            self._flushed = size

    def next_unsent(self) -> tuple[Event, int] | None:
        """Return the oldest unsent event and the position after it, or None."""
        return next(self._events(self.position), None)

    def next_metrics(self) -> tuple[list[Metrics], int]:
        """Return the oldest unsent events, up to the first that is none of metrics, and their end.

        They are as many as may be sent together.
        """
        start = end = self.position
        found: list[Metrics] = []
        for event, offset in islice(self._events(start), MAX_EVENTS_TOGETHER):
            if not isinstance(event, Metrics) or (found and offset - start > MAX_BYTES_TOGETHER):
                break
            found.append(event)
            end = offset
        return found, end

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
        return self.waiting()[0]

    def waiting(self) -> tuple[int, list[str]]:
        """Return the number of unsent events; file and line of each that cannot be read."""
        num_unsent, ends = 0, set[int]()
        for line, end in self._lines(self.position):
            if self._parsed(line) is None:
                ends.add(end)
            else:
                num_unsent += 1
        numbered = enumerate(self._lines(0), 1) if ends else ()
        return num_unsent, [f"{self.path}:{at}" for at, (_, end) in numbered if end in ends]

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
        if isinstance(event, WithFiles):
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
        """Append an event to its queue."""
        (self.files if isinstance(event, WithFiles) else self.events).append(event)

    def num_unsent(self) -> int:
        """Return the number of unsent events."""
        return sum(queue.num_unsent() for queue in self.queues)

    def waiting(self) -> tuple[int, list[str]]:
        """Return the number of unsent events; file and line of each that cannot be read."""
        found = [queue.waiting() for queue in self.queues]
        return sum(number for number, _ in found), [at for _, places in found for at in places]

    def damaged(self) -> list[str]:
        """Return file and line of each unsent line that cannot be read."""
        return self.waiting()[1]

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
