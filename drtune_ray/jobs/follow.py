"""Follow the log of an attempt to its end, over connections that may break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.jobs.attempts import PENDING, Attempt
from drtune_ray.jobs.server import JobServer

SILENT_SECONDS = 30.0  # without output, until the state of the job is requested
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)  # between retries after a lost connection
PENDING_SECONDS = 10.0
POLL_SECONDS = 0.5
STOP_SECONDS = 60.0  # by default Ray kills after 3


class Follower:
    """Shows an attempt's log, each part once.

    Args:
        server: Job server of the cluster.
        submission_id: Id of the attempt.
        write: Receives text of the log.
        notify: Receives a line for the user.
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
        """Show the log until the attempt has ended.

        Raises:
            EnvironmentProblem: If the server cannot be reached; the attempt may still be running.
            KeyboardInterrupt: On Ctrl-C; the attempt keeps running.
        """
        self._wait_for_start()
        while True:
            try:
                is_whole = asyncio.run(self._show())
                attempt = self._server.attempt(self._id)
                if attempt.is_over and not is_whole:
                    self._show_new(self._server.log(self._id), 0)
            except EnvironmentProblem as error:
                if self._failures == len(PAUSES_SECONDS):
                    return self._end_without_log(error)
                time.sleep(PAUSES_SECONDS[self._failures])
                self._failures += 1
                continue
            if attempt.is_over:
                return attempt
            time.sleep(POLL_SECONDS)

    def _end_without_log(self, error: EnvironmentProblem) -> Attempt:
        """Return an attempt that has ended although its log is lost with its node, or raise."""
        try:
            attempt = self._server.attempt(self._id)
        except EnvironmentProblem as lost:
            error = lost
        else:
            if attempt.is_over:
                self._notify(f"The rest of the log cannot be read: {error}")
                return attempt
        raise EnvironmentProblem(
            f"{error}. {self._id} may still be running: repeat the command to attach to it"
        ) from None

    def _wait_for_start(self) -> None:
        notified = time.monotonic()
        while (attempt := self._server.attempt(self._id)).state == PENDING:
            if time.monotonic() - notified >= PENDING_SECONDS:
                self._notify(f"Job {self._id} is pending: {attempt.message or 'no reason given'}")
                notified = time.monotonic() + 5 * PENDING_SECONDS  # then every minute
            time.sleep(POLL_SECONDS)

    async def _show(self) -> bool:
        """Show the log over one connection; return whether it reached the end of the log."""
        position = 0
        pieces = self._server.tail(self._id)
        while True:
            # Not cancelled on a timeout, which would close the connection.
            piece = asyncio.ensure_future(anext(pieces, None))
            while not (await asyncio.wait({piece}, timeout=SILENT_SECONDS))[0]:
                if self._server.attempt(self._id).is_over:
                    return False
            if (text := piece.result()) is None:
                return True
            self._show_new(text, position)
            position += len(text)

    def _show_new(self, text: str, position: int) -> None:
        """Show the new part of a piece of the log; each connection starts at the beginning."""
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
    """Follow an attempt to its end; return None if Ctrl-C ended the following first.

    Args:
        server: Job server of the cluster.
        attempt: The attempt.
        write: Receives text of the log.
        notify: Receives a line for the user.
        is_stopped: Whether Ctrl-C stops the attempt; a second Ctrl-C then ends the following.
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
    """Stop an attempt, which writes its checkpoints, as on SIGTERM.

    Args:
        server: Job server of the cluster.
        attempt: An attempt that has not ended.

    Raises:
        EnvironmentProblem: If it does not end in time.
    """
    server.stop(attempt.submission_id)
    started = time.monotonic()
    while not (now := server.attempt(attempt.submission_id)).is_over:
        waited = time.monotonic() - started
        if now.state == PENDING and waited > PENDING_SECONDS:
            raise EnvironmentProblem(
                f"{attempt.submission_id} has not started yet, and Ray stops it once it has. If "
                "the cluster never provides its resources, Ray gives up after 15 minutes"
            )
        if waited > STOP_SECONDS:
            raise EnvironmentProblem(
                f"{attempt.submission_id} is still {now.state.lower()} {STOP_SECONDS:g} s after "
                "the request to stop: check the cluster"
            )
        time.sleep(POLL_SECONDS)
    return now
