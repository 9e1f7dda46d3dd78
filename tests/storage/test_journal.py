"""The journal of a study on disks that fill up, and after crashes: no finished trial is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from drtune_ray.results.events import run_finished, run_started
from drtune_ray.results.rebuilt import missing_of
from drtune_ray.results.trials import OUTCOME, summaries, values_by_epoch
from drtune_ray.storage.journal import Missing, WholeJournal
from drtune_ray.storage.optuna_storage import open_storage, open_study
from drtune_ray.storage.record import JOURNAL_NAME
from drtune_ray.study.status import read_status
from drtune_ray.tracking.events import Event, MetricsRecorded, RunFinished, RunStarted
from drtune_ray.tracking.spool import Spool
from tests.small_disks import run_on_small_disk, small_files
from tests.study.test_status import Made, said

LR = optuna.distributions.FloatDistribution(0.0, 1.0)
NUM_TRIALS, NUM_EPOCHS = 3, 2
FULL_DISK = """
import os, sys
from pathlib import Path
from tests.storage.test_journal import drive, plain, resumed

for padding in range(0, 4096, 150):
    folder = Path(sys.argv[1]) / str(padding)
    folder.mkdir()
    study = resumed(folder)
    study.set_user_attr("padding", "x" * padding)
    try:
        (folder.parent / "filler").write_bytes(bytes(2**22))
    except OSError:
        pass
    told = []
    try:
        drive(study, told)
        print("not full")
    except OSError as error:
        print(error.errno)
    os.unlink(folder.parent / "filler")
    assert plain(folder)[: len(told)] == told, (padding, told)
    drive(resumed(folder), [])
    assert len(plain(folder)) == 3, padding
"""


def resumed(folder: Path) -> optuna.Study:
    """As the same command opens it."""
    return open_study(open_storage(folder, None), "flowers")


def drive(study: optuna.Study, told: list[float]) -> None:
    """Finish the trials that run, then new ones; `told` gets the values that were recorded."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for frozen in running:
        finish(study, Trial(study, frozen._trial_id), frozen, told)
    while len(study.get_trials(states=(TrialState.COMPLETE,))) < NUM_TRIALS:
        trial = study.ask()
        finish(study, trial, study.get_trials()[-1], told)


def finish(study: optuna.Study, trial: Trial, frozen: FrozenTrial, told: list[float]) -> None:
    trial.suggest_float("rate", 0.0, 1.0)
    trial.set_user_attr("config", json.dumps({"number": trial.number, "of": "x" * 1500}))
    for epoch in range(1, NUM_EPOCHS + 1):
        if epoch not in frozen.intermediate_values:
            trial.report(trial.number + epoch / 10, epoch)
    study.tell(trial, trial.number + 0.5)
    told.append(trial.number + 0.5)


def plain(folder: Path) -> list[float]:
    """The values of the completed trials, as Optuna itself reads the file."""
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL_NAME)))
    study = optuna.load_study(study_name="flowers", storage=storage)
    return [trial.value for trial in study.get_trials(states=(TrialState.COMPLETE,))]


# ---- a disk that is full at an append


def test_append__taken_back_at_every_append_of_a_study(tmp_path: Path, monkeypatch) -> None:
    """With a part of the record written, its last byte for example, at each append in turn."""
    append, calls = WholeJournal.append_logs, list[int]()

    def limited(at: int, num_bytes: int, backend: WholeJournal, logs: list[Any]) -> None:
        calls.append(1)
        if len(calls) != at:
            return append(backend, logs)
        size = Path(backend._file_path).stat().st_size
        length = len(json.dumps(logs[0], separators=(",", ":"))) + 1
        with small_files(size + (num_bytes if num_bytes >= 0 else length + num_bytes)):
            return append(backend, logs)

    drive(resumed(tmp_path), [])
    num_appends = 1 + NUM_TRIALS * (4 + NUM_EPOCHS)
    assert (tmp_path / JOURNAL_NAME).read_bytes().count(b"\n") == num_appends
    for at in range(1, num_appends + 1):
        for num_bytes in (0, 20, -1):
            folder, told = tmp_path / f"{at} {num_bytes}", list[float]()
            folder.mkdir()
            calls.clear()
            with monkeypatch.context() as patch:
                patch.setattr(
                    WholeJournal,
                    "append_logs",
                    lambda backend, logs, at=at, n=num_bytes: limited(at, n, backend, logs),
                )
                with pytest.raises(OSError, match="File too large"):
                    drive(resumed(folder), told)
            assert (folder / JOURNAL_NAME).read_bytes().count(b"\n") == at - 1
            if at > 1:
                assert plain(folder) == told
            drive(resumed(folder), [])
            assert plain(folder) == [0.5, 1.5, 2.5]


def test_append__on_a_small_full_file_system(tmp_path: Path) -> None:
    output = run_on_small_disk(tmp_path, "2m", FULL_DISK).split()
    assert set(output) == {"28"}, output  # ENOSPC
    assert len(output) == 28


# ---- damaged records


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A study with the events of its trials, as a driver records both."""
    found = Made(tmp_path / "flowers")
    found.three_and_a_running_one()
    spool = Spool(found.folder / "spool")
    for trial in found.study.get_trials():
        spool.append(run_started(trial))
        for epoch, value in values_by_epoch(trial).items():
            spool.append(MetricsRecorded(trial.number, epoch, {"best_val_accuracy": value}))
        if trial.state.is_finished():
            spool.append(run_finished(trial))
    return found


def opened(made: Made) -> list[FrozenTrial]:
    events = Spool(made.folder / "spool").events.events()
    rebuild = partial(missing_of, events=events, objectives=["val_accuracy"])
    storage = open_storage(made.folder, None, rebuild=rebuild)
    return open_study(storage, made.record.study_id).get_trials()


def content(trials: list[FrozenTrial]) -> list[Any]:
    """All but the duration, which nothing else holds."""
    return [replace(summary, seconds=None) for summary in summaries(trials)]


def torn(lines: list[bytes], at: int) -> bytes:
    """The append of a line failed, and the next one was glued to it."""
    return b"".join([*lines[:at], lines[at][: len(lines[at]) // 2], *lines[at + 1 :]])


def garbled(lines: list[bytes], at: int) -> bytes:
    return b"".join([*lines[:at], b"\x00" * 40 + b"\n", *lines[at + 1 :]])


def wrong(lines: list[bytes], at: int) -> bytes:
    """JSON, but nothing that Optuna knows."""
    record = {"op_code": json.loads(lines[at])["op_code"], "worker_id": ""}
    return b"".join([*lines[:at], json.dumps(record).encode() + b"\n", *lines[at + 1 :]])


@pytest.mark.parametrize("damage", [torn, garbled, wrong])
def test_damaged_line__every_trial_is_rebuilt_whatever_line_it_is(
    made: Made, damage: Callable[[list[bytes], int], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path = made.folder / JOURNAL_NAME
    before, whole = content(made.study.get_trials()), path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) > 25
    for at in range(len(lines)):
        path.write_bytes(damage(lines, at))
        caplog.clear()
        assert content(opened(made)) == before, lines[at]
        aside = made.folder / "optuna.journal.damaged"
        assert caplog.messages == [
            f"{path}: line {at + 1} was damaged, as a full disk or a crash leaves it; it is kept "
            "in optuna.journal.damaged, and what the study's other files know of it was put back"
        ]
        kept = damage(lines, at).splitlines(keepends=True)[at]
        assert aside.read_bytes() == kept or kept.startswith(aside.read_bytes()[:-1])
        caplog.clear()
        assert content(opened(made)) == before  # it is whole now
        assert not caplog.messages
        aside.unlink()


@pytest.mark.parametrize("num_bytes", [1, 30, 200])
def test_torn_end__is_cut_off_kept_aside_and_told(made: Made, num_bytes: int, caplog) -> None:
    path = made.folder / JOURNAL_NAME
    before, whole = content(made.study.get_trials()), path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:num_bytes])
    assert content(opened(made)) == before
    assert path.read_bytes().startswith(whole + b'{"op_code":0,')  # Optuna's at every opening
    assert (made.folder / "optuna.journal.damaged").read_bytes().rstrip() == whole.splitlines()[-1][
        :num_bytes
    ]
    assert f"line {whole.count(bytes([10])) + 1} was damaged" in caplog.text


def test_damaged_line__status_shows_the_rest_and_changes_nothing(made: Made) -> None:
    path = made.folder / JOURNAL_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(garbled(lines, len(lines) - 1))
    found = read_status(str(made.folder), "")
    assert found.num_done == 3
    assert (
        f"warning           {path}:{len(lines)} is damaged and left out; the study's command sets "
        "it aside and rebuilds what it can" in said(found)
    )
    assert path.read_bytes() == garbled(lines, len(lines) - 1)


def test_a_trial_whose_values_nothing_knows_is_trained_again(made: Made) -> None:
    (made.folder / "spool" / "events.jsonl").write_text("")
    lines = (made.folder / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    last_end = max(at for at, line in enumerate(lines) if b'"op_code":6' in line)
    (made.folder / JOURNAL_NAME).write_bytes(garbled(lines, last_end))
    states = [trial.state for trial in opened(made)]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING] + [
        TrialState.RUNNING
    ]
    assert opened(made)[2].user_attrs[OUTCOME] == "completed"


def test_missing_of__several_objectives() -> None:
    """Optuna keeps no intermediate values then; an end whose values are lost is not guessed."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    for objectives in ({}, {"val_accuracy": 0.75, "flops": 3.0}):
        study.ask().set_user_attr("objectives", objectives)
    events: list[Event] = []
    for number in (0, 1):
        events.append(MetricsRecorded(number, 1, {"best_val_accuracy": 0.75}))
        events.append(RunFinished(number, "COMPLETE", "completed", {}, {}, 1000))
    first, second = missing_of(study.trials, events, ["val_accuracy", "flops"]).values()
    assert first.attributes == {"outcome": "completed", "epoch:1": 0.75}
    assert (first.values, first.end) == ({}, None)
    assert second.end is not None
    assert second.end[:2] == (TrialState.COMPLETE, [0.75, 3.0])


def test_missing_of__a_trial_that_resumed_has_not_ended() -> None:
    study = optuna.create_study(direction="maximize")
    study.ask()
    events: list[Event] = [
        RunFinished(0, "FAIL", "node lost", {}, {}, 1000),
        RunStarted(0, "trial-0000", {}, {}, 1001),
        RunFinished(0, "INTERRUPTED", "interrupted", {}, {}, 1002),
    ]
    assert missing_of(study.trials, events, ["val_accuracy"])[0] == Missing({}, {}, None)
