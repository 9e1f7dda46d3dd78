"""Optuna's journal file of a study, kept readable whatever happens to the disk.

An append is whole or taken back. Records that cannot be read are left out by a reader, and set
aside by the study's driver, which puts in their place what other files still know of them.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.folders import LocalFolder, append_line, whole_or_taken_back

logger = logging.getLogger(__name__)
DAMAGED_SUFFIX = ".damaged"
# Optuna's operations.
CREATE_STUDY, CREATE_TRIAL, SET_STATE, SET_VALUE, SET_ATTRIBUTE = 0, 4, 6, 7, 8
RECORD_START = b'{"op_code"'

JournalRecord = dict[str, Any]
# Returns what other files know of trials and these trials lack, by number.
Rebuild = Callable[[Sequence[FrozenTrial]], Mapping[int, "Missing"]]


class WholeJournal(JournalFileBackend):
    """Optuna's journal file, in which an append that fails leaves nothing behind."""

    def append_logs(self, logs: list[JournalRecord]) -> None:
        """Append records; truncate the file to where they began if it fails."""
        with whole_or_taken_back(Path(self._file_path)):
            super().append_logs(logs)


@dataclass(frozen=True)
class Missing:
    """What a journal lacks of a trial.

    Attributes:
        attributes: User attributes.
        values: Intermediate values by epoch.
        end: State, values and time of its end; None if it has not ended.
    """

    attributes: Mapping[str, Any]
    values: Mapping[int, float]
    end: tuple[TrialState, list[float] | None, str] | None

    def records(self, trial_id: int) -> Iterator[JournalRecord]:
        """Yield the records of what the trial lacks, except its end."""
        for name, value in self.attributes.items():
            yield _record(SET_ATTRIBUTE, trial_id=trial_id, user_attr={name: value})
        for step, value in self.values.items():
            yield _record(SET_VALUE, trial_id=trial_id, step=step, intermediate_value=value)

    def end_records(self, trial_id: int) -> Iterator[JournalRecord]:
        """Yield the record of the trial's end."""
        if self.end is not None:
            state, values, time = self.end
            end = {"state": state, "values": values, "datetime_complete": time}
            yield _record(SET_STATE, trial_id=trial_id, **end)


@dataclass
class _Slot:
    """A line of the journal, or a part of one, in the file's order.

    Attributes:
        line: Number of the line, from 1.
        content: Its bytes, as they are in the file.
        records: The records to read in its place; none if it is damaged and cannot be rebuilt.
        is_damaged: Whether `content` is not a record.
    """

    line: int
    content: bytes
    records: list[JournalRecord]
    is_damaged: bool


class _Records(BaseJournalBackend):
    """The records of slots, which are only read."""

    def __init__(self, slots: Iterable[_Slot]) -> None:
        self._records = [(slot, record) for slot in slots for record in slot.records]
        self.last: _Slot | None = None

    def read_logs(self, log_number_from: int) -> Iterator[JournalRecord]:
        for slot, record in self._records[log_number_from:]:
            self.last = slot
            yield record

    def append_logs(self, logs: list[JournalRecord]) -> None:
        raise AssertionError("a journal that is only read")


def read_journal(path: Path, study_id: str) -> tuple[JournalStorage, list[str]]:
    """Read the journal of a study, which may be in use, without its damaged records.

    Args:
        path: The journal.
        study_id: Optuna's name of the study.

    Returns:
        The trials, and a sentence for each damaged line.

    Raises:
        EnvironmentProblem: If the file cannot be read.
    """
    slots = _slots(_content(path))
    storage = _replayed(slots, study_id, ("maximize",))
    damaged = [slot for slot in slots if slot.is_damaged and slot.content.endswith(b"\n")]
    return storage, [
        f"{path}:{line} is damaged and left out; the study's command sets it aside and rebuilds "
        "what it can"
        for line in dict.fromkeys(slot.line for slot in damaged)
    ]


def repair_journal(path: Path, study_id: str, directions: Sequence[str], rebuild: Rebuild) -> None:
    """Set damaged records of a journal aside, and rebuild what other files know of them.

    Args:
        path: The journal; nobody else may write to it.
        study_id: Optuna's name of the study.
        directions: Directions of its objectives.
        rebuild: Returns what the trials that could be read lack.

    Raises:
        EnvironmentProblem: If the file cannot be read.
    """
    slots = _slots(_content(path))
    storage = _replayed(slots, study_id, directions)
    damaged = [slot for slot in slots if slot.is_damaged]
    if not damaged:
        return
    _add_missing(slots, rebuild(_trials(storage, study_id)))
    aside = path.with_name(path.name + DAMAGED_SUFFIX)
    for slot in damaged:
        append_line(aside, slot.content)
    LocalFolder(path.parent).write(path.name, *_lines(slots))
    lines = ", ".join(str(line) for line in dict.fromkeys(slot.line for slot in damaged))
    logger.warning(
        "%s: line %s was damaged, as a full disk or a crash leaves it; it is kept in %s, and what "
        "the study's other files know of it was put back",
        path,
        lines,
        aside.name,
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}, which holds the trials, cannot be read ({error.strerror}): bring it back "
            "from a backup, or give the study another --name"
        ) from None


def _slots(content: bytes) -> list[_Slot]:
    return [
        slot
        for number, line in enumerate(io.BytesIO(content), 1)
        for slot in _slots_of(number, line)
    ]


def _slots_of(number: int, line: bytes) -> Iterator[_Slot]:
    """Yield the record of a line; of two glued together, the torn one and the whole one."""
    at = 0
    while at >= 0:
        record = _parsed(line[at:])
        if record is not None:
            if at > 0:
                yield _Slot(number, line[:at] + b"\n", [], is_damaged=True)
            yield _Slot(number, line[at:], [record], is_damaged=False)
            return
        at = line.find(RECORD_START, at + 1)
    yield _Slot(number, line, [], is_damaged=True)


def _parsed(line: bytes) -> JournalRecord | None:
    """Return the record of a whole line, None if it is not one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("op_code"), int)
    return record if is_record and _has_sound_texts(record) else None


def _has_sound_texts(record: JournalRecord) -> bool:
    """Return whether the attributes that hold JSON can be read."""
    attributes = record.get("user_attr")
    for text in attributes.values() if isinstance(attributes, dict) else ():
        if isinstance(text, str) and (text.startswith("{") or text.endswith("}")):
            try:
                json.loads(text)
            except ValueError:
                return False
    return True


def _fill_gaps(slots: list[_Slot], study_id: str, directions: Sequence[str]) -> None:
    """Put bare records in the place of damaged ones that later records need.

    Optuna numbers trials by their order: a trial that later records name, and that none before
    them creates, was created by a damaged record.
    """
    num_trials, gaps = 0, list[_Slot]()
    has_study = any(_operation(slot) == CREATE_STUDY for slot in slots if not slot.is_damaged)
    for slot in slots:
        if slot.is_damaged:
            slot.records = []
            gaps.append(slot)
            continue
        if gaps and not has_study:
            directed = [StudyDirection[direction.upper()] for direction in directions]
            gaps.pop(0).records = [_record(CREATE_STUDY, study_name=study_id, directions=directed)]
            has_study = True
        num_lacking = _num_trials_named(slot) - num_trials
        for gap in gaps[len(gaps) - num_lacking :] if 0 < num_lacking <= len(gaps) else ():
            gap.records = [_record(CREATE_TRIAL, study_id=0, datetime_start=None)]
            gaps.remove(gap)
            num_trials += 1
        num_trials += _operation(slot) == CREATE_TRIAL


def _num_trials_named(slot: _Slot) -> int:
    """Return how many trials there must be for a record that changes one."""
    trial_id = slot.records[0].get("trial_id") if slot.records else None
    return trial_id + 1 if isinstance(trial_id, int) else 0


def _operation(slot: _Slot) -> int | None:
    return slot.records[0]["op_code"] if slot.records else None


def _replayed(slots: list[_Slot], study_id: str, directions: Sequence[str]) -> JournalStorage:
    """Replay the records; those that Optuna cannot apply are damaged too."""
    while True:
        _fill_gaps(slots, study_id, directions)
        backend = _Records(slots)
        try:
            return JournalStorage(backend)
        except Exception:  # whatever a wrong value in a record leads to
            if backend.last is None or backend.last.is_damaged:
                raise
            backend.last.is_damaged = True


def _trials(storage: JournalStorage, study_id: str) -> list[FrozenTrial]:
    try:
        number = storage.get_study_id_from_name(study_id)
    except KeyError:
        return []
    return storage.get_all_trials(number, deepcopy=False)


def _add_missing(slots: list[_Slot], missing: Mapping[int, Missing]) -> None:
    """Add what trials lack in the first damaged place since their start, their ends at the end."""
    tail = _Slot(0, b"", [], is_damaged=True)
    number, open_trials = 0, list[int]()
    for slot in [*slots, tail]:
        if _operation(slot) == CREATE_TRIAL:
            open_trials += [number] if number in missing else []
            number += 1
        if slot.is_damaged:
            for trial in open_trials:
                slot.records += missing[trial].records(trial)
            open_trials = []
    for trial in sorted(missing):
        tail.records += missing[trial].end_records(trial)
    slots.append(tail)


def _lines(slots: Iterable[_Slot]) -> Iterator[bytes]:
    for slot in slots:
        if not slot.is_damaged:
            yield slot.content
        else:
            yield from (json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in slot.records)


def _record(operation: int, **values: Any) -> JournalRecord:
    return {"op_code": operation, "worker_id": "", **values}
