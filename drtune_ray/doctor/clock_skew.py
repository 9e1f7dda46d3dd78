"""How far another clock is from this one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

MAX_SKEW_SECONDS = 5.0
NUM_QUESTIONS = 5
FIX = (
    "synchronise the clocks (NTP, chrony): object stores and certificates refuse a wrong time, and "
    "records get mixed up"
)


@dataclass(frozen=True)
class Skew:
    """Seconds by which a clock is ahead of this one, and how far that may be wrong."""

    seconds: float
    uncertainty: float

    @property
    def is_too_large(self) -> bool:
        """Whatever the true value within the uncertainty is."""
        return abs(self.seconds) - self.uncertainty > MAX_SKEW_SECONDS

    def __str__(self) -> str:
        where = "ahead of" if self.seconds > 0 else "behind"
        return f"{abs(self.seconds):.1f} s {where} this machine's"


def measured_skew(ask: Callable[[], float], clock: Callable[[], float] = time.time) -> Skew:
    """Ask a clock some times; the quickest answer tells most.

    Args:
        ask: The other clock.
        clock: This one.
    """
    found = []
    for _ in range(NUM_QUESTIONS):
        before = clock()
        answer = ask()
        after = clock()
        found.append(Skew(answer - (before + after) / 2, (after - before) / 2))
    return min(found, key=lambda skew: skew.uncertainty)
