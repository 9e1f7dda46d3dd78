"""What a process that trains owes to the cluster and to the driver of its study.

It saves when it is asked to, leaves when its machine is taken away, shows that it moves, and ends
itself when it is stuck. A resident actor and a Ray Train worker do the same::

    guard = WorkerGuard(study_id, hang_seconds)
    with guard.guarding(trial_folder, rank):
        for event in train_epochs(
            ..., save_requested=guard.save_requested, on_progress=guard.progressed
        ):
            event.save(folder)
            guard.leave_if_told()

Three things ask for a save: SIGTERM, the drain of the process's own node, and the driver when it
is interrupted (`ask_to_save`). After the first two the process must leave, and `leave_if_told`
raises what Ray Tune takes for a preemption: the trial goes on elsewhere, and no failure is
counted.

SIGTERM is heard where `listening_for_sigterm` is entered on the main thread, as `guarding` does
in a resident actor. Ray Train calls its training function in another thread, and Ray sets its own
handler after every setup hook; there, the worker's own actor has to be asked, whose methods run on
the main thread: ``RayTrainWorker.execute(listen_for_sigterm)``.

Driver and processes talk through the key-value store of Ray's head: it reaches every node, whether
or not a file system does, and nothing of it stays on a disk.
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

from drtune_ray.execution.heartbeat import PROGRESS, SAVE, SAVED
from drtune_ray.execution.ray_state import is_drained, read_value, write_value
from drtune_ray.training.distributed import gather_objects

POLL_SECONDS = 0.5
# How often the guard is wound up again, at most.
PROGRESS_SECONDS = 1.0
STACKS = "hang-{}.txt"
# SIGTERM is told to a process, not to an object in it.
_told_to_leave = threading.Event()


class Preempted(RayActorError):  # type: ignore[misc]
    """This process was told to leave and has saved; not a failure of the trial."""

    def __init__(self, message: str = "the process was told to leave") -> None:
        super().__init__(error_msg=message, preempted=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.error_msg,)


class WorkerGuard:
    """One for each process that trains.

    Args:
        study_id: Of the study or training.
        hang_seconds: A process that makes no progress for so long writes its stacks into the
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
        """Within, the trial of this folder must make progress.

        Args:
            trial_folder: Takes the stacks of a process that hangs.
            rank: Of this process among those of the trial.
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
        """The training moves; cheap enough for every step."""
        now = time.monotonic()
        if now - self._last_progress < self._interval:
            return
        self._last_progress = now
        self._num_progress += 1
        assert self._stacks is not None, "outside of guarding"
        # A thread of C that needs no GIL: it ends a process that is stuck in any library.
        faulthandler.dump_traceback_later(self._hang_seconds, exit=True, file=self._stacks)

    def save_requested(self) -> bool:
        """Whether a save is due that nobody has made; True once for each request."""
        if _told_to_leave.is_set() and not self._has_saved_to_leave:
            self._has_saved_to_leave = True
            return True
        if self._save.is_set():
            self._save.clear()
            self._is_awaited = True
            return True
        return False

    def leave_if_told(self) -> None:
        """To be called where everything is saved; the driver that asked for it is told.

        All processes of a trial call it at the same time and leave together: one alone would let
        the others wait for it.

        Raises:
            Preempted: If a process was told to leave: by SIGTERM or because its node is drained.
        """
        if self._is_awaited:
            self._is_awaited = False
            write_value(self._key(SAVED), self._answered or "")
        if any(gather_objects(_told_to_leave.is_set())):
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
