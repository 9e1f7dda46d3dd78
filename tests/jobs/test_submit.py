"""Which attempt runs a study: on a job server that remembers, as Ray's does."""

from __future__ import annotations

from typing import Any

import pytest

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.jobs.attempts import Attempt
from drtune_ray.jobs.server import UsedId
from drtune_ray.jobs.submission import EntrypointResources, Submission, study_submission
from drtune_ray.jobs.submit import submit

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
        f"{ADDRESS} has a job {job} that is not an attempt of this study: delete it (`ray job "
        "delete`), or give the study another --name"
    )
