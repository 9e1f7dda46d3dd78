"""The jobs of a study on a cluster, for people and for programs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, TextIO

from drtune_ray.display.outputs import write_json
from drtune_ray.display.text import duration
from drtune_ray.jobs.attempts import (
    PENDING,
    RUNNING,
    Attempt,
    end_of,
)
from drtune_ray.jobs.submission import STUDY_FILE, Submission


def submit_lines(submission: Submission, attempt: Attempt, *, is_new: bool) -> Iterator[str]:
    """What was sent, and to which attempt it led.

    Args:
        submission: The study.
        attempt: That runs it.
        is_new: Whether it was started for this submission.
    """
    if is_new:
        sent = ", ".join([STUDY_FILE, *submission.variables.sent])
        yield f"Submitted {attempt.submission_id}, and with it: {sent}"
        return
    yield f"{attempt.submission_id} is {attempt.state.lower()}: nothing was sent"
    if attempt.settings != submission.settings:
        yield "It was submitted with other settings; for these to hold, stop it first"


def job_lines(attempts: Sequence[Attempt], address: str, now: float | None = None) -> Iterator[str]:
    """The attempts of one study, oldest first.

    Args:
        attempts: Of one study.
        address: Of their cluster.
        now: Seconds since 1970; None: the present.
    """
    now = time.time() if now is None else now
    newest = attempts[-1]
    yield f"Study {newest.study!r} in {newest.storage}, jobs at {address}:"
    for attempt in attempts:
        begun = datetime.fromtimestamp(attempt.started).strftime("%Y-%m-%d %H:%M:%S")
        took = duration((attempt.ended or now) - attempt.started)
        yield f"  {attempt.submission_id}  {_state(attempt)}; since {begun}, for {took}"
    if newest.state == PENDING and newest.message:
        yield f"  {newest.message}"
    if end := end_of(newest):
        yield f"  {end}"


def job_facts(attempts: Sequence[Attempt], address: str) -> dict[str, Any]:
    """The attempts of one study, oldest first, for programs.

    Args:
        attempts: Of one study.
        address: Of their cluster.
    """
    jobs = [
        {key: value for key, value in asdict(attempt).items() if key not in ("study", "storage")}
        for attempt in attempts
    ]
    return {
        "study": attempts[-1].study,
        "storage": attempts[-1].storage,
        "address": address,
        "jobs": jobs,
    }


def ways_on(attempt: Attempt, address: str, program: str) -> Iterator[str]:
    """How an attempt that was left is met again.

    Args:
        attempt: The attempt.
        address: Of its cluster, with what must follow it.
        program: How this program is called from here.
    """
    where = f"{attempt.study} --storage {attempt.storage} --address {address}"
    yield f"Follow it:  {program} logs {where} --follow"
    yield f"Stop it:    {program} stop {where}"


class JsonLog:
    """A log in which JSON lines and words are mixed: only the former go to stdout.

    Args:
        stdout: Takes the objects.
        stderr: Takes the rest.
    """

    def __init__(self, stdout: TextIO, stderr: TextIO) -> None:
        self._stdout, self._stderr, self._begun = stdout, stderr, ""
        self._has_result = False

    def write(self, text: str) -> None:
        """Take text that may end within a line."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            stream = self._stdout if line.startswith("{") else self._stderr
            stream.write(f"{line}\n")
            stream.flush()
            self._has_result |= line.startswith('{"kind": "result"')

    def close(self, exit_code: int, reason: str) -> None:
        """Say the end where the log does not: its job was killed, or goes on unseen."""
        if not self._has_result:
            write_json(self._stdout, "result", {"exit_code": exit_code, "reason": reason})


def _state(attempt: Attempt) -> str:
    if attempt.state in (PENDING, RUNNING) or attempt.exit_code is None:
        return attempt.state.lower()
    return f"{attempt.state.lower()} with exit code {attempt.exit_code}"
