"""Interrupts of a driver: SIGTERM and Ctrl-C, and saving before it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from drtune_ray.execution.cluster_watch import told_of_end
from drtune_ray.execution.environment import job_config
from drtune_ray.execution.heartbeat import ask_to_save, forget

# A job that Ray stops is killed three seconds after SIGTERM.
JOB_SAVE_SECONDS = 1.5
SAVE_SECONDS = 5.0


def save_seconds() -> float:
    """Return how long an interrupted driver waits at most for its trials to save."""
    return JOB_SAVE_SECONDS if job_config().get("metadata") else SAVE_SECONDS


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM and Ctrl-C within a block.

    An error that the interrupt causes on its way is replaced by the KeyboardInterrupt.
    """
    was_interrupted = False

    def interrupt(signum: int, frame: Any) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        raise KeyboardInterrupt

    try:
        former = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are the caller's
        yield
        return
    try:
        yield
    except Exception as error:
        if was_interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def saving_when_interrupted(
    study_id: str, running: Callable[[], list[str]], tell: Callable[[], None]
) -> Iterator[None]:
    """Let the running trials save for a short time when a block is interrupted.

    Args:
        study_id: Id of the study.
        running: Returns the names of the folders of the running trials.
        tell: Called meanwhile, to inform the observers.
    """
    forget(study_id)  # requests of a killed driver
    seconds = save_seconds()

    def save() -> None:
        ask_to_save(study_id, running(), seconds)
        forget(study_id)

    try:
        with told_of_end(tell):
            yield
    except KeyboardInterrupt:
        # In a thread: a cluster whose head is gone must not delay the end.
        saving = threading.Thread(target=save, daemon=True)
        saving.start()
        tell()
        saving.join(seconds)
        raise
    forget(study_id)
