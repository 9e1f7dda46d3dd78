"""The guard of a training process: saves on request, preemption, progress and hangs.

A process saves when requested, leaves when its machine is taken away, reports progress, and ends
itself when it is stuck. A resident actor and a Ray Train worker use it alike::

    guard = WorkerGuard(study_id, hang_seconds)
    with guard.guarding(trial_folder, rank):
        for event in train_epochs(
            ..., save_requested=guard.save_requested, on_progress=guard.progressed
        ):
            event.save(folder)
            guard.leave_if_told(event.settle)

Three things request a save: SIGTERM, the drain of the process's own node, and the driver when it is
interrupted (`ask_to_save`). After the first two the process must leave: `leave_if_told` raises what
Ray Tune treats as a preemption, so that the trial resumes elsewhere and no failure is counted.

SIGTERM is handled where `listening_for_sigterm` is entered on the main thread, as `guarding` does
in a resident actor. Ray Train calls its training function in another thread, and Ray installs its
own handler after every setup hook. There, a method of the worker's actor must install ours, since
these run on the main thread: ``RayTrainWorker.execute(listen_for_sigterm)``.

Driver and processes communicate through the key-value store of Ray's head. It reaches every node
without a shared file system, and writes nothing to a disk.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import ray
from ray.exceptions import RayActorError

from drtune_ray.execution.heartbeat import PROGRESS, SAVE, SAVED
from drtune_ray.execution.ray_state import is_drained, read_value, write_value
from drtune_ray.training.distributed import gather_objects

POLL_SECONDS = 0.5
# Minimum interval between two resets of the hang timer.
PROGRESS_SECONDS = 1.0
STACKS = "hang-{}.txt"
# SIGTERM concerns the process, not one object in it.
_told_to_leave = threading.Event()


class Preempted(RayActorError):  # type: ignore[misc]
    """Raised when this process must leave and has saved; not a failure of the trial."""

    def __init__(self, message: str = "the process was told to leave") -> None:
        super().__init__(error_msg=message, preempted=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.error_msg,)


class WorkerGuard:
    """The guard of one training process.

    Args:
        study_id: Id of the study or training.
        hang_seconds: Seconds without progress after which the process writes its stacks into the
            trial's folder and ends.
    """

    def __init__(self, study_id: str, hang_seconds: float) -> None:
        self._study_id, self._hang_seconds = study_id, hang_seconds
        self._interval = min(PROGRESS_SECONDS, hang_seconds / 4)
        self._save = threading.Event()
        self._answered = read_value(f"{study_id}/{SAVE}")
        self._is_awaited = self._has_saved_to_leave = False
        self._stacks: IO[str] | None = None
        self._trial_name, self._rank = "", 0
        self._num_progress, self._last_progress = 0, 0.0
        # Asked for once: Ray joins a cluster anew when it is asked after it was left.
        is_in_cluster = ray.is_initialized()
        self._node_id = ray.get_runtime_context().get_node_id() if is_in_cluster else None
        threading.Thread(target=self._watch, name="guard", daemon=True).start()

    @contextlib.contextmanager
    def guarding(self, trial_folder: Path, rank: int = 0) -> Iterator[None]:
        """Require progress of a trial within a block.

        Args:
            trial_folder: Folder that receives the stacks of a hanging process.
            rank: Rank of this process among those of the trial.
        """
        trial_folder.mkdir(parents=True, exist_ok=True)
        self._trial_name, self._rank = trial_folder.name, rank
        path = trial_folder / STACKS.format(rank)
        with path.open("w") as self._stacks, listening_for_sigterm():
            self._last_progress = 0.0
            self.progressed()
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
                path.unlink(missing_ok=True)  # it is empty: a process that hangs never comes here

    def progressed(self) -> None:
        """Report progress; cheap enough for every step."""
        now = time.monotonic()
        if now - self._last_progress < self._interval:
            return
        self._last_progress = now
        self._num_progress += 1
        assert self._stacks is not None, "outside of guarding"
        # A thread of C that needs no GIL: it ends a process that is stuck in any library.
        faulthandler.dump_traceback_later(self._hang_seconds, exit=True, file=self._stacks)

    def save_requested(self) -> bool:
        """Return whether a save was requested; True once for each request."""
        if _told_to_leave.is_set() and not self._has_saved_to_leave:
            self._has_saved_to_leave = True
            return True
        if self._save.is_set():
            self._save.clear()
            self._is_awaited = True
            return True
        return False

    def leave_if_told(self, settle: Callable[[], None]) -> None:
        """Confirm a requested save, and leave if this process must; call it after a save.

        All processes of a trial call it at the same time and leave together: the others would wait
        for one that left alone.

        Args:
            settle: Function that writes what the last save left for later; called before a save is
                confirmed and before the process leaves.

        Raises:
            Preempted: If a process must leave, after SIGTERM or because its node is drained.
        """
        flags = gather_objects((_told_to_leave.is_set(), self._is_awaited))
        is_told, is_awaited = (any(of_all) for of_all in zip(*flags, strict=True))
        if is_told or is_awaited:
            settle()
        if self._is_awaited:
            self._is_awaited = False
            write_value(self._key(SAVED), self._answered or "")
        if is_told:
            raise Preempted

    def _key(self, what: str) -> str:
        return f"{self._study_id}/{what}/{self._trial_name}/{self._rank}"

    def _watch(self) -> None:
        num_told = 0
        while True:
            time.sleep(POLL_SECONDS)
            request = read_value(f"{self._study_id}/{SAVE}")
            if request not in (None, self._answered):
                self._answered = request
                self._save.set()
            if self._num_progress != num_told:
                num_told = self._num_progress
                write_value(self._key(PROGRESS), f"{os.getpid()} {num_told}")
            if not _told_to_leave.is_set() and is_drained(self._node_id):
                _told_to_leave.set()


def listen_for_sigterm() -> None:
    """Make SIGTERM request a save and an end of this process instead of killing it.

    Python allows this on the main thread only.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: _told_to_leave.set())


@contextlib.contextmanager
def listening_for_sigterm() -> Iterator[None]:
    """Apply `listen_for_sigterm` within a block; do nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.getsignal(signal.SIGTERM)
    listen_for_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
