"""Attempts: which are a study's, and how they ended."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from drtune_ray.errors import ConfigError
from drtune_ray.jobs.attempts import (
    Attempt,
    attempt_of,
    attempts_at,
    end_of,
    exit_code_of,
)

ADDRESS = "http://127.0.0.1:8265"
BEGUN = Attempt("drtune-a-1", "a", "/shared", 1, "", "RUNNING", None, "", 0.0, None)


def attempt(number: int, study: str = "a", storage: str = "/shared") -> Attempt:
    return replace(BEGUN, number=number, study=study, storage=storage)


def test_attempts_at__oldest_first():
    there = [attempt(10), attempt(2), attempt(3, study="b")]
    assert [a.number for a in attempts_at(there, "a", None, ADDRESS)] == [2, 10]


def test_attempts_at__none():
    there = [attempt(1, study="b")]
    for study, storage, where in (("a", None, ""), ("b", "/other", " in /other")):
        with pytest.raises(ConfigError) as caught:
            attempts_at(there, study, storage, ADDRESS)
        assert str(caught.value) == (
            f"no study {study!r}{where} was submitted to {ADDRESS}; it has ['b']"
        )
    with pytest.raises(ConfigError, match=rf"^no study 'a' was submitted to {ADDRESS}$"):
        attempts_at([], "a", None, ADDRESS)


def test_attempts_at__several_storages():
    there = [attempt(1), attempt(1, storage="/other")]
    with pytest.raises(ConfigError) as caught:
        attempts_at(there, "a", None, ADDRESS)
    assert "['/other', '/shared']" in str(caught.value)
    assert str(caught.value).endswith(": choose one with --storage")
    assert attempts_at(there, "a", "/other", ADDRESS) == there[1:]


def test_attempt_of__jobs_of_others():
    job = SimpleNamespace(
        submission_id="drtune-a-1",
        metadata={"drtune_study": "a", "drtune_storage": "/shared", "drtune_attempt": "1"},
        status="FAILED",
        driver_exit_code=2,
        message="said",
        start_time=1500,
        end_time=2500,
    )
    assert attempt_of(job) == Attempt(
        "drtune-a-1", "a", "/shared", 1, "", "FAILED", 2, "said", 1.5, 2.5
    )
    for change in (
        {"metadata": None},
        {"metadata": {"drtune_study": "a"}},
        {"metadata": job.metadata | {"drtune_attempt": "one"}},
        {"submission_id": None},
    ):
        assert attempt_of(SimpleNamespace(**vars(job) | change)) is None


LOG = "see its log"
AGAIN = "repeat the command to resume"
ENDS = [
    ("SUCCEEDED", 0, 0, None),
    ("STOPPED", None, 130, f"was stopped: {AGAIN}"),
    ("FAILED", 1, 1, f"failed with exit code 1: {LOG}"),
    ("FAILED", 2, 2, f"failed with exit code 2: {LOG}"),
    ("FAILED", 3, 3, f"failed with exit code 3: {LOG}"),
    ("FAILED", 130, 130, f"was stopped: {AGAIN}"),
    ("FAILED", -9, 3, f"was killed (signal 9): {AGAIN}"),
    ("FAILED", 137, 3, f"was killed (signal 9): {AGAIN}"),
    ("FAILED", 77, 3, f"failed with exit code 77: {LOG}"),
    (
        "FAILED",
        127,
        3,
        "found no drtune-ray on the cluster: install it there, in the environment or image in "
        "which Ray was started",
    ),
    ("FAILED", None, 3, "could not be run: no node"),
]


@pytest.mark.parametrize(("state", "code", "exit_code", "sentence"), ENDS)
def test_end_of(state, code, exit_code, sentence):
    ended = replace(BEGUN, state=state, exit_code=code, message="no\n  node")
    assert exit_code_of(ended) == exit_code
    assert end_of(ended) == (f"Job drtune-a-1 {sentence}" if sentence else None)


def test_end_of__a_running_one_has_none():
    assert end_of(BEGUN) is None
