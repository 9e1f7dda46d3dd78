"""The jobs of a study on a cluster: one an attempt, since Ray never takes a used id again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from drtune_ray.errors import ConfigError

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
            + (f"; there are {there}" if there else "")
        )
    if len(storages := sorted({a.storage for a in found})) > 1:
        raise ConfigError(
            f"studies of the name {study!r} were submitted with the storages {storages}: say which "
            "by --storage"
        )
    return sorted(found, key=lambda attempt: attempt.number)
