"""Failures of the machine by name; who judges them, and by what."""

from __future__ import annotations

import errno
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.train import WorkerGroupError

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution import guard as guard_module
from drtune_ray.execution import heartbeat
from drtune_ray.execution.failures import (
    HUNG_STACKS,
    UNFIT_NODE,
    clear_stacks,
    described,
    failure_from,
    full_disk_as_problem,
    outcome_of,
)
from drtune_ray.execution.guard import Preempted
from drtune_ray.execution.heartbeat import HeartbeatMonitor
from drtune_ray.execution.ray_tune.patches import ProcessLost, failure_of, nothing_unpickled
from tests.clusters import joined

DIED = (
    "The actor died unexpectedly before finishing this task.\n\tactor_id: 1\n\tpid: 2\n"
    "The actor is dead because its worker process has died."
)
FULL = OSError(errno.ENOSPC, "No space left on device", "epoch.ckpt")
PROBLEM = "drtune_ray.errors.EnvironmentProblem"
NOT_SHARED = "the storage /data is not shared with node 10.0.0.7: put --storage on a file system"
IN_CREATION = f"""The actor died because of an error raised in its creation task, ray::TrialActor
  File "/x/actor.py", line 1, in setup
{PROBLEM}: {NOT_SHARED}"""
FAILURES = {
    "disk": (FULL, "disk full", "OSError: [Errno 28] No space left on device: 'epoch.ckpt'"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full", None),
    "python": (MemoryError("no memory"), "out of memory on the host", "MemoryError: no memory"),
    "torch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "out of memory on the host",
        None,
    ),
    "monitor": (OutOfMemoryError("1 worker(s) were killed"), "out of memory on the host", None),
    "monitor, translated": (
        ProcessLost(error_msg="1 worker(s) were killed due to the node running low on memory.\nx"),
        "out of memory on the host",
        "1 worker(s) were killed due to the node running low on memory.",
    ),
    "node": (
        RayActorError(error_msg="The actor died because its node has died."),
        "node lost",
        None,
    ),
    "node of an object": (NodeDiedError("node"), "node lost", None),
    "killed": (
        RayActorError(error_msg=DIED),
        "process killed",
        "The actor is dead because its worker process has died.",
    ),
    "as an actor was made": (
        RayActorError(error_msg=IN_CREATION.replace(f"{PROBLEM}: {NOT_SHARED}", "KeyError: 'x'")),
        "machine failure",
        "KeyError: 'x'",
    ),
    "a bug": (KeyError("x"), "machine failure", "KeyError: 'x'"),
}


@pytest.mark.parametrize(("error", "outcome", "line"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("is_raised_in_a_task", [False, True])
def test_failures_have_names(error, outcome, line, is_raised_in_a_task):
    if is_raised_in_a_task and not isinstance(error, RayActorError | NodeDiedError):
        error = RayTaskError("train", "Traceback ...", error)
        error = pickle.loads(pickle.dumps(error)).as_instanceof_cause()
    assert outcome_of(error) == outcome
    assert line is None or described(error) == line


@pytest.mark.parametrize(
    "error",
    [
        EnvironmentProblem(NOT_SHARED),
        RayActorError(error_msg=IN_CREATION),
        WorkerGroupError("failed", {0: RuntimeError("lost"), 1: EnvironmentProblem(NOT_SHARED)}),
    ],
    ids=["raised", "as an actor was made", "in one of several workers"],
)
def test_what_is_wrong_with_a_node_is_the_users_to_mend(tmp_path, error):
    failure = failure_from(error, tmp_path)
    assert failure.outcome == UNFIT_NODE
    assert failure.error == str(failure.problem) == NOT_SHARED
    assert isinstance(failure.problem, EnvironmentProblem)


NOT_INSTALLED = "ModuleNotFoundError: No module named 'timm'"


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'timm'"),
        RayActorError(
            error_msg=IN_CREATION.replace(
                f"{PROBLEM}: {NOT_SHARED}",
                "RuntimeError: The actor with name TrialActor failed to import on the worker:\n\n"
                f"  File resident_actor.py\n{NOT_INSTALLED}",
            )
        ),
        WorkerGroupError("failed", {0: RuntimeError("lost"), 1: ImportError("No module named x")}),
    ],
    ids=["raised", "as an actor was made", "in one of several workers"],
)
def test_what_a_node_cannot_import_is_named(tmp_path, error):
    """It was "process killed", and the error a line without the module."""
    failure = failure_from(error, tmp_path)
    assert failure.outcome == UNFIT_NODE
    assert failure.error == str(failure.problem)
    assert re.search(
        r"\((ModuleNotFoundError: .* .timm.|ImportError: .* x)\): install", failure.error
    )


def test_other_failures_are_nobodys_to_mend(tmp_path):
    assert failure_from(RayActorError(error_msg=DIED), tmp_path).problem is None


def test_a_process_that_hung_left_its_stacks(tmp_path):
    (tmp_path / "hang-0.txt").write_text(
        "Timeout (0:01:02.500000)!\n"
        'Thread 0x1 (most recent call first):\n  File "other.py", line 1 in wait\n\n'
        'Thread 0x2 (most recent call first):\n  File "conv.py", line 7 in forward\n'
        '  File "loop.py", line 9 in train_epochs\n'
    )
    failure = failure_of(SimpleNamespace(temporary_state=None), tmp_path)
    assert failure.outcome == "hung for 62.5 s"
    kept = tmp_path / HUNG_STACKS
    assert failure.error == f"hung for 62.5 s in forward (conv.py, line 7); its stacks: {kept}"
    # The next process that ends in this folder did not hang.
    again = failure_of(SimpleNamespace(temporary_state=None), tmp_path)
    assert again.outcome == "machine failure"
    clear_stacks(tmp_path, has_failed=True)
    assert kept.exists()
    clear_stacks(tmp_path, has_failed=False)
    assert not kept.exists()


def test_full_disk_as_problem(tmp_path):
    with pytest.raises(EnvironmentProblem) as caught, full_disk_as_problem(tmp_path):
        try:
            raise FULL
        except OSError as error:
            raise RuntimeError("Tune failed") from error
    assert str(caught.value) == (
        f"the disk that holds {tmp_path} is full: free space there, then the same command "
        "resumes the study"
    )
    with pytest.raises(KeyError), full_disk_as_problem(tmp_path):
        raise KeyError


def test_who_was_told_to_leave_is_no_failure_of_the_trial():
    error = RayTaskError("train", "Traceback ...", Preempted()).as_instanceof_cause()
    assert error.preempted
    assert isinstance(pickle.loads(pickle.dumps(Preempted("drained"))), Preempted)


class Clock:
    """Time, and what processes told, by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.told: dict[str, list[str] | None] = {}
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(heartbeat, "_told", lambda study, what, name: self.told[name])


def stuck_after(watch: HeartbeatMonitor, clock: Clock, seconds: float, step: float) -> list[str]:
    found = []
    for _ in range(round(seconds / step)):
        clock.now += step
        found = watch.stuck([*clock.told])
    return found


def test_a_process_whose_progress_does_not_change_is_stuck(monkeypatch):
    clock = Clock(monkeypatch)
    watch = HeartbeatMonitor("study", hang_seconds=20)
    clock.told = {"silent": [], "still": ["7 1"], "moving": ["8 1"]}
    assert stuck_after(watch, clock, 24, 0.5) == []
    clock.told["moving"] = ["8 2"]
    assert stuck_after(watch, clock, 10, 5) == ["silent", "still"]


@pytest.mark.parametrize("away", ["driver", "head"])
def test_a_driver_that_sees_nothing_blames_nobody(monkeypatch, away):
    clock = Clock(monkeypatch)
    watch = HeartbeatMonitor("study", hang_seconds=20)
    clock.told = {"still": ["7 1"]}
    stuck_after(watch, clock, 10, 5)
    if away == "head":
        clock.told = {"still": None}
        assert stuck_after(watch, clock, 3600, 5) == []
        clock.told = {"still": ["7 1"]}
    else:
        clock.now += 3600
    assert watch.stuck(["still"]) == []
    assert stuck_after(watch, clock, 10, 5) == []


def test_files_of_the_guard_are_gone_when_it_ends(tmp_path: Path):
    guard = guard_module.WorkerGuard("study", hang_seconds=60)
    with guard.guarding(tmp_path / "00000"):
        assert [path.name for path in (tmp_path / "00000").iterdir()] == ["hang-0.txt"]
        guard.progressed()
    assert not [*(tmp_path / "00000").iterdir()]


class Planted:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


class Failing(tune.Trainable):
    def step(self) -> dict[str, Any]:
        raise KeyError("x")


class Planting(tune.Callback):
    """Another user of the machine and of the storage."""

    def __init__(self, mark: Path) -> None:
        self.planted, self.found = pickle.dumps(Planted(mark)), []

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_error(self, trial: Any, **info: Any) -> None:
        Path(trial.pickled_error_file).write_bytes(self.planted)
        (Path(trial.path) / "error.pkl").write_bytes(self.planted)
        self.found.append(failure_of(trial, Path("/nonexistent")))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.on_trial_error(trial=trials[0])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("clusters")
def test_tune_unpickles_nothing_that_others_may_have_written(shared_ray, tmp_path, monkeypatch):
    def fit(name: str) -> tuple[bool, Planting, Any]:
        mark = tmp_path / f"run-{name}"
        planting = Planting(mark)
        run = tune.RunConfig(name=name, storage_path=str(tmp_path), callbacks=[planting], verbose=0)
        grid = tune.Tuner(Failing, run_config=run).fit()
        return mark.exists(), planting, grid

    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    with joined(shared_ray.address):
        is_run, _, _ = fit("tune-alone")
        assert is_run, "Ray has learned not to unpickle: nothing_unpickled may go"
        with nothing_unpickled():
            is_run, planting, grid = fit("ours")
    assert not is_run
    assert [failure.error for failure in planting.found] == ["KeyError: 'x'"] * 2
    assert "KeyError" in str(grid[0].error)


def test_an_error_that_leads_back_to_itself_ends() -> None:
    """It ended in a RecursionError, in place of the message."""
    first, second = ValueError("first"), EnvironmentProblem("Ray cannot be started")
    first.__context__, second.__context__ = second, first
    assert outcome_of(second) == "machine failure"
    assert described(second) == "ValueError: first"
