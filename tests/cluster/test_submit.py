"""Which attempt runs a study: on a job server that remembers, as Ray's does."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from drtune_ray.cluster.attempts import Attempt, attempt_of, attempts_at
from drtune_ray.cluster.resources import EntrypointResources
from drtune_ray.cluster.server import UsedId
from drtune_ray.cluster.submission import Submission, study_submission
from drtune_ray.cluster.submit import submit
from drtune_ray.errors import ConfigError, EnvironmentProblem

ADDRESS = "http://127.0.0.1:8265"
FLAGS = {"data_folder": "/images", "storage": "/shared", "name": "a"}


def attempt(number: int, state: str, study: str = "a", storage: str = "/shared") -> Attempt:
    job = f"drtune-{study}-{number}"
    return Attempt(job, study, storage, number, "", state, None, "", 0.0, None)


class Remembering:
    """A job server without jobs that do anything."""

    address = ADDRESS

    def __init__(self, *there: Attempt) -> None:
        self.there, self.hidden, self.started = list(there), list[Attempt](), list[str]()

    def attempts(self) -> list[Attempt]:
        return list(self.there)

    def start(self, submission: Submission, number: int, command: str, *more: Any) -> Attempt:
        self.there, hidden = [*self.there, *self.hidden], self.hidden
        self.hidden = []
        if number in [a.number for a in [*self.there, *hidden] if a.study == submission.study]:
            raise UsedId
        self.started.append(submission.submission_id(number))
        self.there.append(attempt(number, "PENDING"))
        return self.there[-1]


def submitted(server: Any) -> tuple[Attempt, bool]:
    study = study_submission(None, [], FLAGS)
    return submit(server, study, "drtune-ray tune", EntrypointResources(), ())


def test_submit__the_first():
    server = Remembering(attempt(4, "STOPPED", study="b"), attempt(5, "RUNNING", storage="/other"))
    found, is_new = submitted(server)
    assert (found.number, is_new) == (1, True)


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_submit__the_next_after_one_that_is_over(state):
    server = Remembering(attempt(2, state), attempt(1, "FAILED"))
    found, is_new = submitted(server)
    assert (found.number, is_new) == (3, True)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_submit__the_one_that_is_not_over(state):
    server = Remembering(attempt(1, "FAILED"), attempt(2, state))
    assert submitted(server) == (attempt(2, state), False)
    assert server.started == []


def test_submit__another_was_faster():
    server = Remembering(attempt(1, "FAILED"))
    server.hidden = [attempt(2, "RUNNING")]
    assert submitted(server) == (attempt(2, "RUNNING"), False)
    assert server.started == []


def test_submit__an_id_that_is_no_attempt():
    server = Remembering()
    server.start = lambda *_: (_ for _ in ()).throw(UsedId)  # type: ignore[method-assign]
    with pytest.raises(EnvironmentProblem) as caught:
        submitted(server)
    job = study_submission(None, [], FLAGS).submission_id(1)
    assert str(caught.value) == (
        f"{ADDRESS} has a job {job} that is no attempt of this study: delete it (`ray job "
        "delete`), or give the study another --name"
    )


# ---- of a name


def test_attempts_at__oldest_first():
    there = [attempt(10, "RUNNING"), attempt(2, "FAILED"), attempt(3, "RUNNING", study="b")]
    assert [a.number for a in attempts_at(there, "a", None, ADDRESS)] == [2, 10]


def test_attempts_at__none():
    there = [attempt(1, "RUNNING", study="b")]
    for study, storage, where in (("a", None, ""), ("b", "/other", " in /other")):
        with pytest.raises(ConfigError) as caught:
            attempts_at(there, study, storage, ADDRESS)
        assert str(caught.value) == (
            f"no study {study!r}{where} was submitted to {ADDRESS}; there are ['b']"
        )
    with pytest.raises(ConfigError, match=rf"^no study 'a' was submitted to {ADDRESS}$"):
        attempts_at([], "a", None, ADDRESS)


def test_attempts_at__several_storages():
    there = [attempt(1, "RUNNING"), attempt(1, "FAILED", storage="/other")]
    with pytest.raises(ConfigError) as caught:
        attempts_at(there, "a", None, ADDRESS)
    assert str(caught.value) == (
        "studies of the name 'a' were submitted with the storages ['/other', '/shared']: say "
        "which by --storage"
    )
    assert attempts_at(there, "a", "/other", ADDRESS) == there[1:]


def test_attempt_of__jobs_of_others():
    job = SimpleNamespace(
        submission_id="drtune-a-1",
        metadata=study_submission(None, [], FLAGS).metadata(1, []),
        status="FAILED",
        driver_exit_code=2,
        message="said",
        start_time=1500,
        end_time=2500,
    )
    found = attempt_of(job)
    assert found is not None
    assert replace(found, settings="") == Attempt(
        "drtune-a-1", "a", "/shared", 1, "", "FAILED", 2, "said", 1.5, 2.5
    )
    for change in (
        {"metadata": None},
        {"metadata": {"drtune_study": "a"}},
        {"metadata": job.metadata | {"drtune_attempt": "one"}},
        {"submission_id": None},
    ):
        assert attempt_of(SimpleNamespace(**vars(job) | change)) is None
