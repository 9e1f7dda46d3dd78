"""Measure the difference between another clock and this one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

MAX_SKEW_SECONDS = 5.0
NUM_READINGS = 5
FIX = (
    "synchronise the clocks (NTP, chrony): with a wrong time, object stores and certificates are "
    "refused and records get out of order"
)


@dataclass(frozen=True)
class Skew:
    """Seconds by which a clock is ahead of this one, with the uncertainty in seconds."""

    seconds: float
    uncertainty: float

    @property
    def is_too_large(self) -> bool:
        """Whether every value within the uncertainty exceeds the limit."""
        return abs(self.seconds) - self.uncertainty > MAX_SKEW_SECONDS

    def __str__(self) -> str:
        where = "ahead of" if self.seconds > 0 else "behind"
        return f"{abs(self.seconds):.1f} s {where} this machine's"


def measured_skew(read: Callable[[], float], clock: Callable[[], float] = time.time) -> Skew:
    """Read another clock several times and return the reading with the least uncertainty.

    Args:
        read: Returns the time of the other clock, in seconds.
        clock: Returns the time of this machine, in seconds.
    """
    found = []
    for _ in range(NUM_READINGS):
        before = clock()
        other = read()
        after = clock()
        found.append(Skew(other - (before + after) / 2, (after - before) / 2))
    return min(found, key=lambda skew: skew.uncertainty)
