"""The jobs of a study on a cluster: one per attempt, since Ray accepts each id only once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from drtune_ray.errors import ConfigError, EnvironmentProblem

# Metadata keys of a job; all values are strings.
STUDY_KEY, STORAGE_KEY, NUMBER_KEY, SETTINGS_KEY = (
    "drtune_study",
    "drtune_storage",
    "drtune_attempt",
    "drtune_settings",
)
PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED = (
    "PENDING",
    "RUNNING",
    "SUCCEEDED",
    "FAILED",
    "STOPPED",
)
INTERRUPTED = 130
OWN_CODES = (0, 1, 2, 3, INTERRUPTED)  # exit codes of drtune-ray
MACHINE = EnvironmentProblem.exit_code
NOT_FOUND = 127  # exit code of a shell that does not find the command
MAX_REASON = 2000


@dataclass(frozen=True)
class Attempt:
    """A job that runs, or ran, a study.

    Attributes:
        submission_id: Ray's id of the job.
        study: Name of the study.
        storage: Storage of the study on the cluster.
        number: Number of the attempt, from 1.
        settings: Hash of the submitted settings.
        state: Ray's state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        exit_code: Exit code of the command; None if it has not exited by itself.
        message: Ray's message about the state.
        started: Start time in seconds since 1970.
        ended: End time in seconds since 1970, or None.
    """

    submission_id: str
    study: str
    storage: str
    number: int
    settings: str
    state: str
    exit_code: int | None
    message: str
    started: float
    ended: float | None

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.state not in (PENDING, RUNNING)


def attempt_of(job: Any) -> Attempt | None:
    """Convert Ray's `JobDetails` to an attempt; None for a job of another program."""
    metadata = job.metadata or {}
    number = metadata.get(NUMBER_KEY, "")
    if not job.submission_id or STUDY_KEY not in metadata or not number.isdecimal():
        return None
    return Attempt(
        submission_id=job.submission_id,
        study=metadata[STUDY_KEY],
        storage=metadata.get(STORAGE_KEY, ""),
        number=int(number),
        settings=metadata.get(SETTINGS_KEY, ""),
        state=str(job.status),
        exit_code=job.driver_exit_code,
        message=job.message or "",
        started=(job.start_time or 0) / 1000,
        ended=job.end_time / 1000 if job.end_time else None,
    )


def attempts_at(
    attempts: Iterable[Attempt], study: str, storage: str | None, address: str
) -> list[Attempt]:
    """Return the attempts of one study, oldest first.

    Args:
        attempts: Attempts of all studies of a cluster.
        study: Name of the study.
        storage: Storage of the study; None if the name is unique.
        address: Address of the cluster, for messages.

    Raises:
        ConfigError: If there is none, or if several storages hold a study of that name.
    """
    attempts = list(attempts)
    found = [a for a in attempts if a.study == study and storage in (None, a.storage)]
    if not found:
        there = sorted({a.study for a in attempts})
        raise ConfigError(
            f"no study {study!r}{f' in {storage}' if storage else ''} was submitted to {address}"
            + (f"; it has {there}" if there else "")
        )
    if len(storages := sorted({a.storage for a in found})) > 1:
        raise ConfigError(
            f"studies named {study!r} were submitted with the storages {storages}: choose one "
            "with --storage"
        )
    return sorted(found, key=lambda attempt: attempt.number)


def exit_code_of(attempt: Attempt) -> int:
    """Return the exit code of an attempt that has ended, as if the study had run here."""
    if attempt.state == SUCCEEDED:
        return 0
    if attempt.state == STOPPED:
        return INTERRUPTED
    code = attempt.exit_code
    return code if code is not None and code in OWN_CODES else MACHINE


def end_of(attempt: Attempt) -> str | None:
    """Describe the end of an attempt that did not succeed; None for any other."""
    job, code = f"Job {attempt.submission_id}", attempt.exit_code
    again = "repeat the command to resume"
    if attempt.state == STOPPED or code == INTERRUPTED:
        return f"{job} was stopped: {again}"
    if attempt.state != FAILED:
        return None
    if code is None:
        return f"{job} could not be run: {_short(attempt.message)}"
    if code == NOT_FOUND:
        return (
            f"{job} found no drtune-ray on the cluster: install it there, in the environment or "
            "image in which Ray was started"
        )
    if code in OWN_CODES:
        return f"{job} failed with exit code {code}: see its log"
    if code < 0 or code > 128:
        return f"{job} was killed (signal {-code if code < 0 else code - 128}): {again}"
    return f"{job} failed with exit code {code}: see its log"


def _short(message: str) -> str:
    text = " ".join(message.split()) or "no reason given"
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."
