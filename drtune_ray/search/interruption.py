"""An interrupted driver leaves a study that loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from drtune_ray.search.lifeline import ask_to_save, forget

# A job that Ray stops is killed three seconds after SIGTERM.
SAVE_SECONDS = 1.5


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
