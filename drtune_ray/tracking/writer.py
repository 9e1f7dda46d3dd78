"""Sends the events of a spool to a tracking server, from one background thread."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.tracking.events import Event, Metrics, MetricsRecorded, StepsRecorded, WithFiles
from drtune_ray.tracking.spool import Queue, Spool

logger = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
CLOSING_RETRY_SECONDS = 0.5
CLOSING_POLL_SECONDS = 0.1
MAX_CLOSING_SECONDS = 120.0


class Recorder(Protocol):
    """A destination of events; recording the same event twice must change nothing."""

    def record(self, event: Event) -> None:
        """Record one event, or raise."""

    def record_metrics(self, events: Sequence[Metrics]) -> None:
        """Record metrics of any runs, each run's in their order, or raise."""

    def lacks_study(self) -> bool:
        """Return whether it holds nothing of the study, so that all events must be sent again."""


class BackgroundWriter:
    """Sends a spool's events from a thread of its own, in order, until closed.

    Metrics of an epoch or a step are recorded once: an epoch that is trained again after a kill, or
    reported again by a trial that resumes, would be a second point of the same curve.

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
        kinds = (MetricsRecorded.kind, StepsRecorded.kind)
        self._recorded = {point(e) for e in spool.events.events(*kinds) if isinstance(e, Metrics)}
        self._deadline = float("inf")
        if damaged := spool.damaged():
            logger.warning("tracking: damaged, and therefore not sent: %s", ", ".join(damaged))
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def emit(self, event: Event) -> None:
        """Write an event to disk, to be sent later."""
        if isinstance(event, Metrics) and point(event) in self._recorded:
            return
        try:
            self._spool.append(event)
            if isinstance(event, Metrics):
                self._recorded.add(point(event))
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


def point(event: Metrics) -> tuple[object, ...]:
    """Return what identifies metrics: their run, their place in it, and which they are."""
    if isinstance(event, MetricsRecorded):
        return event.number, event.step, frozenset(event.metrics)
    return event.number, event.first_step, len(event.steps)


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
        event, end = unsent
        metrics, end_of_metrics = queue.next_metrics()
        queue.flush(end := max(end, end_of_metrics))
        if metrics:
            recorder.record_metrics(metrics)
        elif isinstance(event, WithFiles) and queue is not spool.files:
            spool.append(event)  # of an earlier version, or restored
        else:
            recorder.record(event)
        queue.mark_sent(end)
        num_sent += max(1, len(metrics))
    return num_sent
