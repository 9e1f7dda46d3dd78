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
    """Yield lines on what was submitted, and on the attempt that runs it.

    Args:
        submission: The study.
        attempt: The attempt that runs the study.
        is_new: Whether this submission started the attempt.
    """
    if is_new:
        sent = ", ".join([STUDY_FILE, *submission.variables.sent])
        yield f"Submitted {attempt.submission_id} with {sent}"
        return
    yield f"{attempt.submission_id} is already {attempt.state.lower()}: nothing was submitted"
    if attempt.settings != submission.settings:
        yield "It was submitted with other settings; to apply these, stop it first"


def job_lines(attempts: Sequence[Attempt], address: str, now: float | None = None) -> Iterator[str]:
    """Yield lines on the attempts of one study, oldest first.

    Args:
        attempts: Attempts of one study.
        address: Address of their cluster.
        now: Seconds since 1970; None means the present time.
    """
    now = time.time() if now is None else now
    newest = attempts[-1]
    yield f"Study {newest.study!r} in {newest.storage}, jobs at {address}:"
    for attempt in attempts:
        since = datetime.fromtimestamp(attempt.started).strftime("%Y-%m-%d %H:%M:%S")
        took = duration((attempt.ended or now) - attempt.started)
        yield f"  {attempt.submission_id}  {_state(attempt)}; since {since}, for {took}"
    if newest.state == PENDING and newest.message:
        yield f"  {newest.message}"
    if end := end_of(newest):
        yield f"  {end}"


def job_facts(attempts: Sequence[Attempt], address: str) -> dict[str, Any]:
    """Return the attempts of one study, oldest first, for programs.

    Args:
        attempts: Attempts of one study.
        address: Address of their cluster.
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
    """Yield the commands that follow or stop a running attempt.

    Args:
        attempt: The attempt.
        address: Address of its cluster, with the options that it needs.
        program: Command line name of this program.
    """
    where = f"{attempt.study} --storage {attempt.storage} --address {address}"
    yield f"Follow it:  {program} logs {where} --follow"
    yield f"Stop it:    {program} stop {where}"


class JsonLog:
    """A log of JSON lines mixed with text: only the JSON lines go to stdout.

    Args:
        stdout: Receives the JSON lines.
        stderr: Receives the rest.
    """

    def __init__(self, stdout: TextIO, stderr: TextIO) -> None:
        self._stdout, self._stderr, self._partial = stdout, stderr, ""
        self._has_result = False

    def write(self, text: str) -> None:
        """Write text, which may end within a line."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            stream = self._stdout if line.startswith("{") else self._stderr
            stream.write(f"{line}\n")
            stream.flush()
            self._has_result |= line.startswith('{"kind": "result"')

    def close(self, exit_code: int, reason: str) -> None:
        """Write a result line if the log has none: its job was killed or is no longer followed."""
        if not self._has_result:
            write_json(self._stdout, "result", {"exit_code": exit_code, "reason": reason})


def _state(attempt: Attempt) -> str:
    if attempt.state in (PENDING, RUNNING) or attempt.exit_code is None:
        return attempt.state.lower()
    return f"{attempt.state.lower()} with exit code {attempt.exit_code}"
