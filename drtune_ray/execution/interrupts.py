"""Interrupts of a driver: SIGTERM as Ctrl-C, and an end that further signals do not disturb."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from drtune_ray.execution.heartbeat import ask_to_save, forget

# A job that Ray stops is killed three seconds after SIGTERM.
SAVE_SECONDS = 1.5


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """SIGTERM and Ctrl-C both become KeyboardInterrupt and leave a resumable study.

    Whatever error an interruption causes on its way, it is an interruption that is reported.
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
    """Within, Ctrl-C and SIGTERM have the running trials save first, for a short time.

    Args:
        study_id: Of the study.
        running: Gives the names of the folders of the trials that run.
        tell: Called meanwhile: tells the observers.
    """
    forget(study_id)  # what a killed driver asked for

    def save() -> None:
        ask_to_save(study_id, running(), SAVE_SECONDS)
        forget(study_id)

    try:
        yield
    except KeyboardInterrupt:
        # In a thread: a cluster whose head is gone must not hold up who leaves it.
        saving = threading.Thread(target=save, daemon=True)
        saving.start()
        tell()
        saving.join(SAVE_SECONDS)
        raise
    forget(study_id)
