"""Waiting for resources: visible to the user, and limited."""

from __future__ import annotations

import time
from collections.abc import Callable

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.capacity import Demand
from drtune_ray.execution.ray_state import Placements, free_text, placements

Notify = Callable[[str], None]
FIRST_NOTICE_SECONDS = 10.0
NOTICE_EVERY_SECONDS = 60.0
LOOK_EVERY_SECONDS = 1.0
# Ray Train takes a pending request back and makes it again; the time between is still waiting.
GAP_SECONDS = 5.0


class ResourceWait:
    """Reports while no trial can be placed, and gives up after a time.

    Args:
        demand: Resources of a trial.
        limit_seconds: Seconds without a placed trial after which it gives up.
        notify: Takes a line for the user.
        look: Returns how Ray has placed the trials.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self,
        demand: Demand,
        limit_seconds: float,
        notify: Notify,
        *,
        look: Callable[[], Placements] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._demand, self._limit, self._notify = demand, limit_seconds, notify
        self._look = look or (lambda: placements(demand))
        self._clock = clock
        self._looked = self._pending = -GAP_SECONDS
        self._since: float | None = None
        self._next_notice = FIRST_NOTICE_SECONDS

    def check(self) -> None:
        """Check the placement, at most once a second; call it often.

        Raises:
            EnvironmentProblem: If no trial had its resources for too long.
        """
        now = self._clock()
        if now - self._looked < LOOK_EVERY_SECONDS:
            return
        self._looked = now
        found = self._look()
        if found.is_pending:
            self._pending = now
        if found.is_placed or now - self._pending > GAP_SECONDS:
            self._end()
        elif self._since is None:
            self._since = now
        else:
            self._wait(now - self._since)

    def _wait(self, waited: float) -> None:
        if waited >= self._limit:
            raise EnvironmentProblem(
                f"no trial could start for {_time(waited)}: a trial takes {self._demand} and "
                f"{free_text()} are free. Nothing is lost: the same command resumes it. Free "
                f"resources, add nodes, or raise resources.wait_seconds={self._limit:g}"
            )
        if waited >= self._next_notice:
            self._notify(
                f"waiting for {self._demand}: {free_text()} are free; gives up in "
                f"{_time(self._limit - waited)}"
            )
            self._next_notice += NOTICE_EVERY_SECONDS

    def _end(self) -> None:
        if self._next_notice > FIRST_NOTICE_SECONDS:
            self._notify(f"{self._demand} are there: going on")
        self._since, self._next_notice = None, FIRST_NOTICE_SECONDS


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
