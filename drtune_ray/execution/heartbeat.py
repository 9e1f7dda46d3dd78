"""TODO docstring."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

from ray.experimental import internal_kv

from drtune_ray.execution.ray_state import NAMESPACE, _read, _write

# Keys: the study's id, one of these, then name of the trial's folder and rank.
SAVE, SAVED, PROGRESS = "save", "saved", "progress"
# The driver looks this much later than the process itself, whose stacks say more.
GRACE_SECONDS = 5.0


def ask_to_save(study_id: str, trial_names: Iterable[str], seconds: float) -> None:
    """Have the running trials of a study save at their next step, and wait until they did.

    Args:
        study_id: Of the study.
        trial_names: Names of the folders of the trials that run now.
        seconds: How long to wait at most.
    """
    request, deadline = str(time.time_ns()), time.monotonic() + seconds
    _write(f"{study_id}/{SAVE}", request)
    waiting = set(trial_names)
    while waiting and time.monotonic() < deadline:
        waiting = {name for name in waiting if request not in (_told(study_id, SAVED, name) or ())}
        time.sleep(0.02)


def forget(study_id: str) -> None:
    """Remove from Ray's head what a study and its processes told each other."""
    with contextlib.suppress(Exception):  # the head is gone, and everything with it
        internal_kv._internal_kv_del(f"{study_id}/", del_by_prefix=True, namespace=NAMESPACE)


class ProgressWatch:
    """The driver's eye on processes that do not even run: stopped, or on a machine that is stuck.

    It judges by what changes, and by the time that the driver itself was awake: no clocks are
    compared, and a driver that was stopped for an hour blames nobody.

    Args:
        study_id: Of the study.
        hang_seconds: As for `Lifeline`.
    """

    def __init__(self, study_id: str, hang_seconds: float) -> None:
        self._study_id, self.hang_seconds = study_id, hang_seconds
        self._interval = min(GRACE_SECONDS, hang_seconds / 4)
        self._last_look = time.monotonic()
        self._seen: dict[str, tuple[list[str] | None, float]] = {}

    def stuck(self, trial_names: list[str]) -> list[str]:
        """Which of the running trials have made no progress for too long; call it often.

        Args:
            trial_names: Names of the folders of the trials that run now.
        """
        waited = time.monotonic() - self._last_look
        if waited < self._interval:
            return []
        self._last_look += waited
        told = {name: _told(self._study_id, PROGRESS, name) for name in trial_names}
        if None in told.values():
            return []
        seen = {}
        for name, progress in told.items():
            former, idle_seconds = self._seen.get(name, (None, 0.0))
            idle_seconds += min(waited, 2 * self._interval)
            seen[name] = progress, idle_seconds if progress == former else 0.0
        self._seen = seen
        limit = self.hang_seconds + GRACE_SECONDS
        return [name for name, (_, idle_seconds) in seen.items() if idle_seconds > limit]


def _told(study_id: str, what: str, trial_name: str) -> list[str] | None:
    """What the processes of a trial told last, by rank; None where nobody can be asked."""
    prefix = f"{study_id}/{what}/{trial_name}/"
    try:
        keys = internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)
    except Exception:  # the cluster's head does not answer just now
        return None
    return [_read(key.decode()) or "" for key in sorted(keys)]
