"""How far another clock is from this one, with clocks that are set by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from drtune_ray.doctor.clock_skew import MAX_SKEW_SECONDS, Skew, measured_skew


def ticking(*seconds: float) -> Iterator[float]:
    return iter(seconds)


def test_measured_skew__the_quickest_answer_counts() -> None:
    here = ticking(0, 8, 10, 12, 20, 21, 30, 34, 40, 49)
    there = ticking(104, 111, 120.5, 132, 144.5)
    assert measured_skew(lambda: next(there), lambda: next(here)) == Skew(100.0, 0.5)


def test_measured_skew__of_the_same_clock() -> None:
    skew = measured_skew(time.time)
    assert abs(skew.seconds) < 0.1
    assert not skew.is_too_large


@pytest.mark.parametrize("sign", [1, -1])
def test_skew__only_what_is_certain_is_too_large(sign: int) -> None:
    assert Skew(sign * (MAX_SKEW_SECONDS + 1.1), 1.0).is_too_large
    assert not Skew(sign * (MAX_SKEW_SECONDS + 0.9), 1.0).is_too_large
    assert not Skew(sign * MAX_SKEW_SECONDS, 0.0).is_too_large


def test_skew__says_which_way() -> None:
    assert str(Skew(3600.04, 0.1)) == "3600.0 s ahead of this machine's"
    assert str(Skew(-7.0, 0.1)) == "7.0 s behind this machine's"
