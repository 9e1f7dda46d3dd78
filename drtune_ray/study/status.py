"""The status of a study or training, read from any process without changing anything."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from drtune_ray.config.metric import metric_of
from drtune_ray.config.study import STUDY, StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.execution.environment import SUBMITTED_WITH, job_config
from drtune_ray.folders import LocalFolder, files_as_problem
from drtune_ray.results.evaluation_record import WEIGHTS_NAME, Evaluation, read_result
from drtune_ray.results.trials import TrialSummary, summaries
from drtune_ray.space.parameters import path_of
from drtune_ray.storage.driver_lock import HOLDER_NAME, driver_of
from drtune_ray.storage.record import (
    DONE_NAME,
    JOURNAL_NAME,
    SPOOL_NAME,
    TRIALS_FOLDER,
    WINNER_NAME,
    Record,
    find_study,
    read_record,
)
from drtune_ray.storage.record import is_done as is_done_with
from drtune_ray.storage.stored_trials import stored_trials
from drtune_ray.tracking.events import MetricsRecorded, RunFinished, RunStarted
from drtune_ray.tracking.spool import EVENTS_NAME, Spool
from drtune_ray.values import flattened

COMMAND_NAME = "command.json"
# Of a study or training; NOT_SEEN: its driver is on another host, or was.
RUNNING, NOT_SEEN, INTERRUPTED, DONE, FAILED = (
    "running",
    "not seen from here",
    "interrupted",
    "done",
    "failed",
)
RESULT_STATES = ("COMPLETE", "PRUNED")
COMPLETE, UNFINISHED = "COMPLETE", "RUNNING"


@dataclass(frozen=True)
class Status:
    """Status of a study or training.

    Attributes:
        folder: Folder of the study or training.
        kind: ``study`` or ``training``.
        state: RUNNING, NOT_SEEN, INTERRUPTED, DONE or FAILED.
        driver: Process and host that drive it, or did last; None if unknown.
        last_sign: Time of its last sign of life (an epoch, save or start), in seconds since 1970.
        num_trials: Number of trials that the study will have.
        num_epochs: Number of epochs of a trial that is not stopped early.
        trials: All trials by number; a training is one.
        sampled: Paths of the settings that were sampled for a trial, by its number.
        num_unsent: Number of events that MLflow has not received.
        evaluation: Recorded result of the winner on the test split; None if it was not opened.
        num_bytes: Size of the folder in bytes, without the tables that studies share.
        command: Command that resumes it; None if it was not started from a command line.
        notes: Sentences on what could not be read.
    """

    folder: Path
    kind: str
    state: str
    driver: str | None
    last_sign: float
    num_trials: int
    num_epochs: int
    trials: tuple[TrialSummary, ...]
    sampled: Mapping[int, tuple[str, ...]]
    num_unsent: int
    evaluation: Evaluation | None
    num_bytes: int
    command: str | None
    notes: tuple[str, ...]

    @property
    def searched(self) -> tuple[str, ...]:
        """Paths of the settings that the search varied so far."""
        return tuple(dict.fromkeys(chain.from_iterable(self.sampled.values())))

    @property
    def num_done(self) -> int:
        """Number of trials of the search with a result; failed ones run again."""
        return sum(trial.state in RESULT_STATES for trial in self.of_search)

    @property
    def of_search(self) -> tuple[TrialSummary, ...]:
        """Trials of the search, without the repetitions of finalists."""
        return tuple(trial for trial in self.trials if not trial.is_final)

    @property
    def finals(self) -> tuple[TrialSummary, ...]:
        """Repetitions of finalists on new seeds."""
        return tuple(trial for trial in self.trials if trial.is_final)

    @property
    def outcomes(self) -> dict[str, int]:
        """Number of trials by outcome, the most frequent first."""
        ended = (trial for trial in self.of_search if trial.state != UNFINISHED)
        return dict(Counter(t.outcome or t.state.lower() for t in ended).most_common())

    @property
    def best(self) -> TrialSummary | None:
        """Best trial of the search that completed or still may; of equals the first."""
        able = [
            trial
            for trial in self.of_search
            if trial.state in (COMPLETE, UNFINISHED) and trial.best_value is not None
        ]
        return max(able, key=lambda t: (t.score, -t.number), default=None)

    @property
    def references(self) -> tuple[TrialSummary, ...]:
        """Reference trials."""
        return tuple(trial for trial in self.trials if trial.reference)

    @property
    def unfinished(self) -> tuple[TrialSummary, ...]:
        """Trials that run, or resume when the command is repeated."""
        return tuple(trial for trial in self.trials if trial.state == UNFINISHED)


@files_as_problem()
def read_status(name_or_folder: str, storage: str) -> Status:
    """Read the status of a study or training.

    Args:
        name_or_folder: Name of the study under the storage, or its folder.
        storage: Folder that holds the studies.

    Raises:
        ConfigError: If there is none, or an environment variable that its database's address
            names is not set.
        EnvironmentProblem: If its database does not answer.
    """
    record = read_record(find_study(name_or_folder, storage))
    folder, notes = record.folder, list[str]()
    is_study = record.kind == STUDY
    frozen = stored_trials(record, notes) if is_study else []
    trials = summaries(frozen) if is_study else _training(record)
    sampled = {trial.number: tuple(map(path_of, trial.distributions)) for trial in frozen}
    driver, is_alive = driver_of(record, notes)
    num_trials = _number(record, "trials") if is_study else 1
    spool = Spool(folder / SPOOL_NAME) if (folder / SPOOL_NAME).is_dir() else None
    num_unsent, damaged = spool.waiting() if spool else (0, [])
    notes += [f"{place} is damaged and is not sent to MLflow" for place in damaged]
    return Status(
        folder=folder,
        kind=record.kind,
        state=_state(record, trials, num_trials, is_alive),
        driver=driver,
        last_sign=_last_sign(folder, trials),
        num_trials=num_trials,
        num_epochs=_number(record, "trial.training.epochs" if is_study else "training.epochs"),
        trials=trials,
        sampled=sampled,
        num_unsent=num_unsent,
        evaluation=read_result(folder, folder / WINNER_NAME / WEIGHTS_NAME),
        num_bytes=sum(_sizes(folder)),
        command=_read_command(folder),
        notes=tuple(notes),
    )


@files_as_problem()
def read_trials(folder: Path) -> tuple[TrialSummary, ...]:
    """Read the trials of a study from its storage, which may be in use.

    Raises:
        ConfigError: If the folder holds no study.
        EnvironmentProblem: If its database does not answer.
    """
    return summaries(stored_trials(read_record(folder)))


def _number(record: Record, path: str) -> int:
    """Return a number of the record's configuration, 0 if it holds none."""
    value = flattened(record.config).get(path)
    return value if isinstance(value, int) else 0


def write_command(folder: Path) -> None:
    """Record the command of this process, or of its job, for `Status.command`."""
    job = job_config()
    submitted_with = (job.get("metadata") or {}).get(SUBMITTED_WITH)
    arguments = json.loads(submitted_with) if submitted_with else sys.argv[1:]
    # A job's own folder is gone after it, and its user's is on another machine.
    content = {"arguments": arguments, "folder": None if job else os.getcwd()}
    LocalFolder(folder).write(COMMAND_NAME, json.dumps(content).encode())


def _read_command(folder: Path) -> str | None:
    try:
        content = json.loads((folder / COMMAND_NAME).read_text())
        command = shlex.join(["drtune-ray", *content["arguments"]])
        there = content["folder"]
        quoted = shlex.quote(there or "")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return command if there in (None, os.getcwd()) else f"cd {quoted} && {command}"


# ---- trials


def _training(record: Record) -> tuple[TrialSummary, ...]:
    """Return a training as a trial, from its events; ends before a resume do not count."""
    epoch: MetricsRecorded | None = None
    end: RunFinished | None = None
    if (record.folder / SPOOL_NAME).is_dir():  # a spool makes its folder
        kinds = (RunStarted.kind, MetricsRecorded.kind, RunFinished.kind)
        for event in Spool(record.folder / SPOOL_NAME).events.events(*kinds):
            if isinstance(event, MetricsRecorded):
                epoch = event
            else:
                end = event if isinstance(event, RunFinished) else None
    state = end.state if end else UNFINISHED
    return (
        TrialSummary(
            number=0,
            state=UNFINISHED if state == "INTERRUPTED" else state,
            outcome=end.outcome if end else "",
            reference=None,
            best_value=epoch.metrics.get(metric_of(record.config).best) if epoch else None,
            num_epochs=epoch.step if epoch else 0,
            seconds=None,
            config=record.config,
        ),
    )


# ---- its state


def _state(
    record: Record, trials: tuple[TrialSummary, ...], num_trials: int, is_alive: bool | None
) -> str:
    if is_alive:
        return RUNNING
    num_results = sum(t.state in RESULT_STATES for t in trials if not t.is_final)
    if record.kind == STUDY:
        is_done = _is_done(record)
        has_failed = num_results >= num_trials and all(t.state != COMPLETE for t in trials)
    else:
        is_done = (record.folder / DONE_NAME).exists()
        has_failed = any(t.state == "FAIL" for t in trials)
    if is_done or has_failed:
        return DONE if is_done else FAILED
    return NOT_SEEN if is_alive is None else INTERRUPTED


def _is_done(record: Record) -> bool:
    try:
        return is_done_with(record.folder, StudyConfig.from_mapping(record.config))
    except ConfigError:  # of another version, or damaged
        return (record.folder / DONE_NAME).is_file()


def _last_sign(folder: Path, trials: tuple[TrialSummary, ...]) -> float:
    """Return the time of the last write to the folder, in seconds since 1970."""
    names = [HOLDER_NAME, JOURNAL_NAME, f"{SPOOL_NAME}/{EVENTS_NAME}", DONE_NAME]
    names += [f"{TRIALS_FOLDER}/{t.number:05d}" for t in trials if t.state == UNFINISHED]
    times = []
    for name in names:
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def _sizes(folder: Path) -> Iterator[int]:
    """Yield the sizes of the files below a folder; files that vanish meanwhile are skipped."""
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                yield path.stat().st_size
        except OSError:
            continue


def facts(status: Status, now: float | None = None) -> dict[str, Any]:
    """Return a status as plain values for programs.

    Args:
        status: The status.
        now: Time in seconds since 1970; None is the present.
    """
    left_out = ("kind", "trials", "sampled")
    kept = {key: value for key, value in vars(status).items() if key not in left_out}
    best = status.best
    return kept | {
        "of": status.kind,
        "seconds_since_last_sign": (time.time() if now is None else now) - status.last_sign,
        "num_done": status.num_done,
        "outcomes": status.outcomes,
        "best": best.to_mapping() if best else None,
        "evaluation": _without_tables(status.evaluation) if status.evaluation else None,
        "settings": best_settings(status),
        "searched": status.searched,
        "references": [trial.to_mapping() for trial in status.references],
        "finals": [trial.to_mapping() for trial in status.finals],
        "unfinished": [trial.to_mapping() for trial in status.unfinished],
    }


def _without_tables(found: Evaluation) -> dict[str, Any]:
    """Return the figures of an evaluation; `evaluate --json` prints its tables too."""
    return {name: value for name, value in found.to_mapping().items() if name != "tables"}


def best_settings(status: Status) -> dict[str, Any]:
    """Return the sampled settings of the best trial; all searched ones if it is off the space."""
    if status.best is None:
        return {}
    values = flattened(status.best.config)
    paths = status.sampled.get(status.best.number) or status.searched
    return {path: values[path] for path in paths if path in values}
