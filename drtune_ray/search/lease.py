"""One driver a study, where drivers have no disk in common: a lease in artifacts.

The holder rewrites it every few seconds. Whoever wants it watches it that long: no clocks are
compared. A holder that finds another one's lease in its place stops.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from drtune_ray.data.artifacts import Folder
from drtune_ray.errors import EnvironmentProblem

logger = logging.getLogger(__name__)

LEASE_NAME = "driver.json"
BEAT_SECONDS = 10.0
NUM_MISSED_BEATS = 3


@contextmanager
def artifacts_lease(folder: Folder, study: str) -> Iterator[None]:
    """Be the only driver of a study, wherever others run.

    Args:
        folder: The study's, in artifacts.
        study: Its name, for messages.

    Raises:
        EnvironmentProblem: If another driver shows that it is alive.
    """
    _wait_for_former(folder, study)
    mine: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "beat": 0}
    mine["token"] = uuid.uuid4().hex
    _write(folder, mine)

    def beat() -> None:
        holder = _read(folder)
        if holder is not None and holder.get("token") != mine["token"]:
            logger.error("study %r was taken over by %s: stopping", study, _name(holder))
            os.kill(os.getpid(), signal.SIGTERM)
            return
        mine["beat"] += 1
        _write(folder, mine)

    try:
        with repeated(BEAT_SECONDS, beat):
            yield
    finally:
        if (_read(folder) or {}).get("token") == mine["token"]:
            folder.remove(LEASE_NAME)


@contextmanager
def repeated(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Do something now and then, from a thread of its own; what fails is logged."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(seconds):
            try:
                action()
            except (OSError, EnvironmentProblem) as error:
                logger.warning("artifacts: %s", error)

    thread = threading.Thread(target=run, name="artifacts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _wait_for_former(folder: Folder, study: str) -> None:
    """Return when nobody holds the lease; a former holder may have died without a word."""
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
            raise EnvironmentProblem(
                f"study {study!r} is being run by {_name(holder)}: wait for it or end it first"
            )


def _died_here(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    if holder.get("host") != socket.gethostname():
        return False
    if holder.get("pid") == os.getpid():  # a container's only process has the same number again
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, and somebody else's
        pass
    return False


def _read(folder: Folder) -> dict[str, Any] | None:
    try:
        holder = json.loads(folder.read(LEASE_NAME))
    except (FileNotFoundError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None


def _write(folder: Folder, holder: dict[str, Any]) -> None:
    folder.write(LEASE_NAME, json.dumps(holder).encode())


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"
