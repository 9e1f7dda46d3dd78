"""The lease that keeps one driver a study where drivers share no disk, only artifacts.

The holder rewrites the lease every few seconds. Another driver watches it for that long before it
takes it, so no clocks are compared. A holder stops when it finds another one's lease, or when it
could not rewrite its own for a time, before another driver may take it for dead.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drtune_ray.errors import EnvironmentProblem, first_line
from drtune_ray.folders import Folder, as_problem
from drtune_ray.processes import is_alive

logger = logging.getLogger(__name__)
LEASE_NAME = "driver.json"
BEAT_SECONDS = 10.0
# A holder gives up before another takes over.
MAX_SILENT_BEATS, NUM_MISSED_BEATS = 2, 3
SETTLE_SECONDS = 2.0  # of drivers that start together, all have written by then
JOIN_SECONDS = 15.0  # for a request that is under way
PROC = Path("/proc")
_held_here: set[str] = set()


class Lease:
    """The right to drive a study, valid until :meth:`check` raises.

    Args:
        folder: Folder of the study in the artifacts.
        study: Name of the study, for messages.
        clock: Clock in seconds.
    """

    def __init__(
        self, folder: Folder, study: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._study, self._clock = folder, study, clock
        self._mine: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": this_machine(),
            "token": uuid.uuid4().hex,
            "beat": 0,
        }
        self._renewed_at = clock()
        self._successor: dict[str, Any] | None = None

    def check(self) -> None:
        """Check that no other driver has taken the study over, or may have.

        Raises:
            EnvironmentProblem: If one has, or may have.
        """
        if self._successor is not None:
            raise EnvironmentProblem(
                f"study {self._study!r} was taken over by {_name(self._successor)}, so this run "
                "of it stopped"
            )
        silent_seconds = self._clock() - self._renewed_at
        if silent_seconds > MAX_SILENT_BEATS * BEAT_SECONDS:
            raise EnvironmentProblem(
                f"the artifacts did not take the lease of study {self._study!r} for "
                f"{silent_seconds:.0f} s, and another driver may take the study over: the same "
                "command resumes it when they answer again"
            )

    def take(self) -> None:
        """Take the lease.

        Raises:
            EnvironmentProblem: If another driver holds it, or took it at the same time.
        """
        _wait_for_former(self._folder, self._study)
        self._write()
        time.sleep(SETTLE_SECONDS)
        if (holder := _read(self._folder)) is None:  # removed by a holder that just ended
            self._write()
        elif not self._is_mine(holder):
            raise EnvironmentProblem(_is_run_by(self._study, holder))
        _held_here.add(self._mine["token"])

    def beat(self) -> None:
        """Rewrite the lease, and check that it is still this driver's."""
        if self._successor is not None:
            return
        holder = _read(self._folder)
        if holder is not None and not self._is_mine(holder):
            self._successor = holder
            logger.error(
                "study %r was taken over by %s: this run stops", self._study, _name(holder)
            )
            return
        self._mine["beat"] += 1
        self._write()

    def give_back(self) -> None:
        """Release the lease; an error on removing it is only logged."""
        _held_here.discard(self._mine["token"])
        try:
            if self._is_mine(_read(self._folder) or {}):
                self._folder.remove(LEASE_NAME)
        except Exception as error:  # whatever ended the study matters more
            logger.warning(
                "artifacts: %s stays (%s); the next driver waits for it",
                self._folder.address(LEASE_NAME),
                first_line(error),
            )

    def _is_mine(self, holder: dict[str, Any]) -> bool:
        return bool(holder.get("token") == self._mine["token"])

    def _write(self) -> None:
        # From when it began to be written: others may see it from then on.
        started = self._clock()
        self._folder.write(LEASE_NAME, json.dumps(self._mine).encode())
        self._renewed_at = started


@contextmanager
def artifacts_lease(folder: Folder, study: str) -> Iterator[Lease]:
    """Hold the lease of a study; the holder must call `Lease.check` often.

    Args:
        folder: Folder of the study in the artifacts.
        study: Name of the study, for messages.

    Raises:
        EnvironmentProblem: If another driver is alive, or the artifacts fail.
    """
    lease = Lease(folder, study)
    with as_problem(folder.address(LEASE_NAME)):
        lease.take()
    try:
        with repeated(BEAT_SECONDS, lease.beat):
            yield lease
    finally:
        lease.give_back()


@contextmanager
def repeated(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Repeat an action in a thread; errors are logged."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(seconds):
            try:
                action()
            except Exception as error:  # the next time it may work
                logger.warning("artifacts: %s", first_line(error))

    thread = threading.Thread(target=run, name="artifacts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(JOIN_SECONDS)


def _wait_for_former(folder: Folder, study: str) -> None:
    """Wait until the lease is free: released, or not rewritten because its holder died."""
    former = _read(folder)
    if former is None or _died_here(former):
        return
    seconds = NUM_MISSED_BEATS * BEAT_SECONDS
    logger.warning(
        "study %r was last run by %s: waiting %g s to see whether it still is",
        study,
        _name(former),
        seconds,
    )
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT_SECONDS))
        holder = _read(folder)
        if holder is None:
            return
        if holder != former:
            raise EnvironmentProblem(_is_run_by(study, holder))


def _died_here(holder: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that has ended."""
    here = {"host": socket.gethostname(), "machine": this_machine()}
    if any(holder.get(name) != value for name, value in here.items()):
        return False
    if holder.get("pid") == os.getpid():  # the number may be that of an earlier process
        return holder.get("token") not in _held_here
    return not is_alive(holder["pid"])


def _read(folder: Folder) -> dict[str, Any] | None:
    try:
        holder = json.loads(folder.read(LEASE_NAME))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    is_holder = isinstance(holder, dict) and isinstance(holder.get("pid"), int)
    return holder if is_holder else None


def this_machine() -> str:
    """Return an id of the process namespace: containers of one host name have one each."""
    boot, numbers = PROC / "sys/kernel/random/boot_id", PROC / "self/ns/pid"
    try:
        return f"{boot.read_text().strip()} {os.readlink(numbers)}"
    except OSError:  # not Linux: the host's name must do
        return ""


def _is_run_by(study: str, holder: dict[str, Any]) -> str:
    return f"study {study!r} is being run by {_name(holder)}: wait for it or end it first"


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"
