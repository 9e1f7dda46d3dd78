"""What a process that trains owes to the cluster and to the driver of its study.

It saves when it is asked to, leaves when its machine is taken away, shows that it moves, and ends
itself when it is stuck. A resident actor and a Ray Train worker do the same::

    lifeline = Lifeline(study_folder / SAVE_REQUEST, hang_seconds)
    with lifeline.guarding(trial_folder, rank):
        for event in train_epochs(
            ..., save_requested=lifeline.save_requested, on_progress=lifeline.progressed
        ):
            event.save(folder)
            lifeline.leave_if_told()

Three things ask for a save: SIGTERM, the drain of the process's own node, and the driver, which
writes into a file when it is interrupted. After the first two the process must leave, and
`leave_if_told` raises what Ray Tune takes for a preemption: the trial goes on elsewhere, and no
failure is counted.

SIGTERM is heard where `listening_for_sigterm` is entered on the main thread, as `guarding` does
in a resident actor. Ray Train calls its training function in another thread, and Ray sets its own
handler after every setup hook; there, the worker's own actor has to be asked, whose methods run on
the main thread: ``RayTrainWorker.execute(listen_for_sigterm)``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import ray
from ray.exceptions import RayActorError

# In the study's folder. It is written in place and read by opening it: a network file system may
# answer from its memory whether a file exists, but not what an opened one holds.
SAVE_REQUEST = "save-request"
POLL_SECONDS = 1.0
PROGRESS_SECONDS = 1.0
HEARTBEATS, STACKS = "heartbeat-{}", "hang-{}.txt"

# SIGTERM is told to a process, not to an object in it.
_told_to_leave = threading.Event()


class Preempted(RayActorError):  # type: ignore[misc]
    """This process was told to leave and has saved; not a failure of the trial."""

    def __init__(self, message: str = "the process was told to leave") -> None:
        super().__init__(error_msg=message, preempted=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.error_msg,)


class Lifeline:
    """One for each process that trains.

    Args:
        request: The file into which the study's driver writes when all trials shall save.
        hang_seconds: A process that makes no progress for so long writes its stacks into the
            trial's folder and ends.
    """

    def __init__(self, request: Path, hang_seconds: float) -> None:
        self._request, self._hang_seconds = request, hang_seconds
        self._interval = min(PROGRESS_SECONDS, hang_seconds / 4)
        self._save = threading.Event()
        self._answered = read_request(request)
        self._has_saved_to_leave = False
        self._stacks: IO[str] | None = None
        self._heartbeat: Path | None = None
        self._last_progress = 0.0
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    @contextlib.contextmanager
    def guarding(self, trial_folder: Path, rank: int = 0) -> Iterator[None]:
        """Within, the trial of this folder must make progress.

        Args:
            trial_folder: Takes the heartbeat, and the stacks of a process that hangs.
            rank: Of this process among those of the trial.
        """
        trial_folder.mkdir(parents=True, exist_ok=True)
        self._heartbeat = trial_folder / HEARTBEATS.format(rank)
        self._heartbeat.touch()
        with (trial_folder / STACKS.format(rank)).open("w") as self._stacks:
            self._last_progress = 0.0
            try:
                with listening_for_sigterm():
                    self.progressed()
                    yield
            finally:
                faulthandler.cancel_dump_traceback_later()

    def progressed(self) -> None:
        """The training moves; cheap enough for every step."""
        now = time.monotonic()
        if now - self._last_progress < self._interval:
            return
        self._last_progress = now
        assert self._heartbeat is not None and self._stacks is not None
        os.utime(self._heartbeat)
        # A thread of C that needs no GIL: it ends a process that is stuck in any library.
        faulthandler.dump_traceback_later(self._hang_seconds, exit=True, file=self._stacks)

    def save_requested(self) -> bool:
        """Whether a save is due that nobody has made; True once for each request."""
        if _told_to_leave.is_set() and not self._has_saved_to_leave:
            self._has_saved_to_leave = True
            return True
        if self._save.is_set():
            self._save.clear()
            return True
        return False

    @property
    def must_leave(self) -> bool:
        """Whether the process was told to leave: by SIGTERM or because its node is drained."""
        return _told_to_leave.is_set()

    def leave_if_told(self) -> None:
        """To be called where everything is saved.

        Raises:
            Preempted: If the process was told to leave.
        """
        if self.must_leave:
            raise Preempted

    def _watch(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            content = read_request(self._request)
            if content != self._answered:
                self._answered = content
                self._save.set()
            if not _told_to_leave.is_set() and _node_is_drained():
                _told_to_leave.set()


def read_request(path: Path) -> str:
    """What the driver wrote, if anything."""
    try:
        return path.read_text()
    except OSError:
        return ""


def listen_for_sigterm() -> None:
    """From now on SIGTERM does not end this process but tells it to save and leave.

    On the main thread only, as Python wants it.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: _told_to_leave.set())


@contextlib.contextmanager
def listening_for_sigterm() -> Iterator[None]:
    """`listen_for_sigterm` for a while; no change where this is not the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.getsignal(signal.SIGTERM)
    listen_for_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def clear(trial_folder: Path) -> None:
    """Remove what `Lifeline` wrote into a trial's folder."""
    for pattern in (HEARTBEATS, STACKS):
        for path in trial_folder.glob(pattern.format("*")):
            path.unlink(missing_ok=True)


def _node_is_drained() -> bool:
    if not ray.is_initialized():
        return False
    try:
        # The same source as Ray Train's own watcher; there is no public one outside of it.
        draining = ray._private.state.state.get_draining_nodes()
    except Exception:  # the cluster's head does not answer just now
        return False
    return ray.get_runtime_context().get_node_id() in draining
