"""Messages between a running trial and its driver: progress, and requests to save."""

from __future__ import annotations

import time
from collections.abc import Iterable

from drtune_ray.execution.ray_state import keys_below, read_value, remove_below, write_value

# Keys: the study's id, one of these words, then the name of the trial's folder and the rank.
SAVE, SAVED, PROGRESS = "save", "saved", "progress"
# The driver acts this much later than the process itself, whose stacks tell more.
GRACE_SECONDS = 5.0


def ask_to_save(study_id: str, trial_names: Iterable[str], seconds: float) -> None:
    """Request that the running trials save at their next step, and wait until they did.

    Args:
        study_id: Id of the study.
        trial_names: Names of the folders of the running trials.
        seconds: Maximum time to wait.
    """
    request, deadline = str(time.time_ns()), time.monotonic() + seconds
    write_value(f"{study_id}/{SAVE}", request)
    waiting = set(trial_names)
    while waiting and time.monotonic() < deadline:
        waiting = {name for name in waiting if request not in (_told(study_id, SAVED, name) or ())}
        time.sleep(0.02)


def forget(study_id: str) -> None:
    """Remove the messages of a study from Ray's head."""
    remove_below(f"{study_id}/")


class HeartbeatMonitor:
    """The driver's monitor of processes that do not run: stopped, or on a machine that hangs.

    It counts only the time that the driver itself was awake since a process last reported progress.
    No clocks are compared, and a driver that was stopped for an hour accuses no trial.

    Args:
        study_id: Id of the study.
        hang_seconds: Seconds without progress after which a process counts as hung.
    """

    def __init__(self, study_id: str, hang_seconds: float) -> None:
        self._study_id, self.hang_seconds = study_id, hang_seconds
        self._interval = min(GRACE_SECONDS, hang_seconds / 4)
        self._last_look = time.monotonic()
        self._seen: dict[str, tuple[list[str] | None, float]] = {}

    def stuck(self, trial_names: list[str]) -> list[str]:
        """Return the running trials without progress for too long; call it often.

        Args:
            trial_names: Names of the folders of the running trials.
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
    """Return the last messages of a trial's processes by rank; None if Ray does not answer."""
    keys = keys_below(f"{study_id}/{what}/{trial_name}/")
    return None if keys is None else [read_value(key) or "" for key in keys]
