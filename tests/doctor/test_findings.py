"""Checks that depend on each other; nothing that one raises stops the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from drtune_ray.doctor.findings import (
    Doubt,
    Examination,
    Finding,
    State,
)
from drtune_ray.errors import ConfigError, EnvironmentProblem


def raising(error: Exception) -> Callable[[], str]:
    def look() -> str:
        raise error

    return look


def test_examination__every_check_has_a_finding() -> None:
    found: list[Finding] = []
    exam = Examination(found.append)
    assert exam.check("a", lambda: "fine")
    assert exam.check("b", raising(Doubt("open to all")))
    assert not exam.check("c", raising(EnvironmentProblem("two fail:\n  one\n  two\nmend them")))
    assert not exam.check("d", raising(ConfigError(["first", "second"])))
    assert not exam.check("e", raising(KeyError("x")))
    assert not exam.check("f", lambda: "not reached", ["a", "c"])
    assert not exam.check("g", lambda: "not reached", ["f"])
    assert exam.check("h", lambda: "fine", ["a", "b"])
    assert found == [
        Finding("a", State.OK, "fine"),
        Finding("b", State.WARNING, "open to all"),
        Finding("c", State.FAILED, "two fail: one; two; mend them"),
        Finding("d", State.FAILED, "first; second"),
        Finding("e", State.FAILED, "KeyError: 'x'"),
        Finding("f", State.SKIPPED, "needs 'c', which failed"),
        Finding("g", State.SKIPPED, "needs 'f', which was skipped"),
        Finding("h", State.OK, "fine"),
    ]
    with pytest.raises(EnvironmentProblem) as caught:
        exam.raise_if_failed()
    assert str(caught.value) == "3 of 8 checks failed: c, d, e"


def test_examination__warnings_are_no_failures() -> None:
    exam = Examination(lambda finding: None)
    exam.check("a", raising(Doubt("open to all")))
    exam.raise_if_failed()
