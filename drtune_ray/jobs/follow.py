"""Following the log of an attempt to its end, over connections that may break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.jobs.attempts import PENDING, Attempt
from drtune_ray.jobs.server import JobServer

# Of a log that says nothing so long it is asked whether its job still runs.
SILENT_SECONDS = 30.0
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)  # between tries to reach a server that was reached before
PENDING_SECONDS = 10.0
LOOK_SECONDS = 0.5
STOP_SECONDS = 60.0  # Ray kills after 3, where it has not been told otherwise


class Follower:
    """Shows an attempt's log, each part once.

    Args:
        server: Of the cluster.
        submission_id: Of the attempt.
        write: Takes text.
        notify: Takes a line while nothing is logged.
    """

    def __init__(
        self,
        server: JobServer,
        submission_id: str,
        write: Callable[[str], None],
        notify: Callable[[str], None],
    ) -> None:
        self._server, self._id, self._write, self._notify = server, submission_id, write, notify
        self._num_shown = 0
        self._failures = 0

    def follow(self) -> Attempt:
        """Until the attempt is over.

        Raises:
            EnvironmentProblem: If the server was lost; the attempt may go on.
            KeyboardInterrupt: On Ctrl-C; the attempt goes on.
        """
        self._wait_for_start()
        while True:
            try:
                is_whole = asyncio.run(self._show())
                attempt = self._server.attempt(self._id)
                if attempt.is_over and not is_whole:
                    self._take(self._server.log(self._id), 0)
            except EnvironmentProblem as error:
                if self._failures == len(PAUSES_SECONDS):
                    return self._end_without_log(error)
                time.sleep(PAUSES_SECONDS[self._failures])
                self._failures += 1
                continue
            if attempt.is_over:
                return attempt
            time.sleep(LOOK_SECONDS)

    def _end_without_log(self, error: EnvironmentProblem) -> Attempt:
        """The attempt, if it is over and only its log is lost, with the node that held it."""
        try:
            attempt = self._server.attempt(self._id)
        except EnvironmentProblem as lost:
            error = lost
        else:
            if attempt.is_over:
                self._notify(f"The rest of the log cannot be read: {error}")
                return attempt
        raise EnvironmentProblem(
            f"{error}. {self._id} may go on: the same command meets it again"
        ) from None

    def _wait_for_start(self) -> None:
        told = time.monotonic()
        while (attempt := self._server.attempt(self._id)).state == PENDING:
            if time.monotonic() - told >= PENDING_SECONDS:
                self._notify(f"Job {self._id} is pending: {attempt.message or 'no reason given'}")
                told = time.monotonic() + 5 * PENDING_SECONDS  # then every minute
            time.sleep(LOOK_SECONDS)

    async def _show(self) -> bool:
        """What one connection says; whether it ended as one does at the log's end."""
        position = 0
        pieces = self._server.tail(self._id)
        while True:
            # Kept when it takes long: to cancel it would end the connection.
            piece = asyncio.ensure_future(anext(pieces, None))
            while not (await asyncio.wait({piece}, timeout=SILENT_SECONDS))[0]:
                if self._server.attempt(self._id).is_over:
                    return False
            if (text := piece.result()) is None:
                return True
            self._take(text, position)
            position += len(text)

    def _take(self, text: str, position: int) -> None:
        """Show what is new of a part of the log, which is read from its beginning each time."""
        if new := text[max(0, self._num_shown - position) :]:
            self._failures = 0
            self._num_shown = position + len(text)
            self._write(new)


def follow(
    server: JobServer,
    attempt: Attempt,
    write: Callable[[str], None],
    notify: Callable[[str], None],
    *,
    is_stopped: bool = False,
) -> Attempt | None:
    """Follow an attempt to its end; None where Ctrl-C has left it.

    Args:
        server: Of the cluster.
        attempt: The attempt.
        write: Takes what it logs.
        notify: Takes a line for the user.
        is_stopped: Whether Ctrl-C stops it; a second one leaves it then.
    """
    follower = Follower(server, attempt.submission_id, write, notify)
    try:
        return follower.follow()
    except KeyboardInterrupt:
        if not is_stopped:
            return None
    try:
        notify(f"Stopping {attempt.submission_id}")
        server.stop(attempt.submission_id)
        return follower.follow()
    except KeyboardInterrupt:
        return None


def stop(server: JobServer, attempt: Attempt) -> Attempt:
    """Stop an attempt; it saves, as on SIGTERM.

    Args:
        server: Of the cluster.
        attempt: That is not over.

    Raises:
        EnvironmentProblem: If it does not end.
    """
    server.stop(attempt.submission_id)
    begun = time.monotonic()
    while not (now := server.attempt(attempt.submission_id)).is_over:
        waited = time.monotonic() - begun
        if now.state == PENDING and waited > PENDING_SECONDS:
            raise EnvironmentProblem(
                f"{attempt.submission_id} has not started yet, and Ray stops it when it does. "
                "Where the cluster will never have what it waits for, Ray gives it up after a "
                "quarter of an hour"
            )
        if waited > STOP_SECONDS:
            raise EnvironmentProblem(
                f"{attempt.submission_id} was told to stop and is {now.state.lower()} after "
                f"{STOP_SECONDS:g} s: look at the cluster"
            )
        time.sleep(LOOK_SECONDS)
    return now
