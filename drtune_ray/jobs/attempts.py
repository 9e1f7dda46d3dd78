"""The jobs of a study on a cluster: one an attempt, since Ray never takes a used id again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from drtune_ray.errors import ConfigError, EnvironmentProblem

# Metadata of a job, all texts.
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
OWN_CODES = (0, 1, 2, 3, INTERRUPTED)  # of drtune-ray
MACHINE = EnvironmentProblem.exit_code
NOT_FOUND = 127  # a shell's, for a command that it does not find
MAX_REASON = 2000


@dataclass(frozen=True)
class Attempt:
    """A job that runs, or ran, a study.

    Attributes:
        submission_id: Ray's name for it.
        study: The study's name.
        storage: Where it lies, on the cluster.
        number: From 1.
        settings: Hash of what it was to do.
        state: Ray's: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        exit_code: Of its command; None where it has not ended by itself.
        message: Ray's, about the state.
        started: Seconds since 1970.
        ended: Seconds since 1970, or None.
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
        """Whether it will never run again."""
        return self.state not in (PENDING, RUNNING)


def attempt_of(job: Any) -> Attempt | None:
    """Ray's `JobDetails` as an attempt; None for a job that is none."""
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
    """All attempts of one study, oldest first.

    Args:
        attempts: Of all studies of a cluster.
        study: Its name.
        storage: Where it lies; None where the name says it.
        address: Of the cluster, for messages.

    Raises:
        ConfigError: If there is none, or studies of that name in several storages.
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
            f"studies of the name {study!r} were submitted with the storages {storages}: say which "
            "by --storage"
        )
    return sorted(found, key=lambda attempt: attempt.number)


def exit_code_of(attempt: Attempt) -> int:
    """The exit code of the study of an attempt that is over: as if it had run here."""
    if attempt.state == SUCCEEDED:
        return 0
    if attempt.state == STOPPED:
        return INTERRUPTED
    code = attempt.exit_code
    return code if code is not None and code in OWN_CODES else MACHINE


def end_of(attempt: Attempt) -> str | None:
    """A sentence about an end that is no success."""
    job, code = f"Job {attempt.submission_id}", attempt.exit_code
    again = "the same command goes on where it stopped"
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
        return f"{job} failed with exit code {code}: its log says why"
    if code < 0 or code > 128:
        return f"{job} was killed (signal {-code if code < 0 else code - 128}): {again}"
    return f"{job} failed with exit code {code}: its log says why"


def _short(message: str) -> str:
    text = " ".join(message.split()) or "no reason given"
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."
