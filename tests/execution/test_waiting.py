"""Waiting for resources: said, ended by resources, and ended by a limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from drtune_ray.config.study import ResourcesConfig, StudyConfig
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution import resource_wait
from drtune_ray.execution.capacity import Demand
from drtune_ray.execution.ray_state import Placements
from drtune_ray.execution.resource_wait import ResourceWait
from drtune_ray.study.run import run_study
from drtune_ray.study.training_run import run_training
from drtune_ray.tracking.events import MetricsRecorded, RunFinished
from tests.clusters import joined
from tests.study.test_study import study_values

pytestmark = pytest.mark.xdist_group("waiting")

PENDING = Placements(is_pending=True, is_placed=False)
RUNNING = Placements(is_pending=True, is_placed=True)  # one runs, another waits for it
IDLE = Placements(is_pending=False, is_placed=False)


class Scene:
    """A wait whose clock and placements are set by hand."""

    def __init__(self, monkeypatch: Any, limit: float) -> None:
        monkeypatch.setattr(resource_wait, "free_text", lambda: "0 of 2 CPUs on 1 node")
        self.now, self.found, self.lines = 0.0, PENDING, []
        self.wait = ResourceWait(
            Demand(2, 1, 1),
            limit,
            self.lines.append,
            look=lambda: self.found,
            clock=lambda: self.now,
        )

    def turn(self, seconds: int, found: Placements) -> None:
        self.found = found
        for _ in range(seconds * 4):
            self.wait.check()
            self.now += 0.25


def test_wait__is_told_after_ten_seconds_and_then_every_minute(monkeypatch):
    scene = Scene(monkeypatch, 1800)
    scene.turn(9, PENDING)
    assert scene.lines == []
    scene.turn(120, PENDING)
    line = "waiting for 2 x {CPU: 1, GPU: 1}: 0 of 2 CPUs on 1 node are free; gives up in "
    assert scene.lines == [line + "30 min", line + "29 min"]


def test_wait__ends_when_a_trial_has_its_resources(monkeypatch):
    scene = Scene(monkeypatch, 30)
    scene.turn(20, PENDING)
    scene.turn(100, RUNNING)
    assert scene.lines[1:] == ["2 x {CPU: 1, GPU: 1} are there: going on"]
    scene.turn(20, PENDING)  # the time counts anew
    assert len(scene.lines) == 3


def test_wait__gives_up_after_the_limit(monkeypatch):
    scene = Scene(monkeypatch, 90)
    with pytest.raises(EnvironmentProblem, match=r"no trial could start for 2 min: .*=90$"):
        scene.turn(100, PENDING)
    assert scene.now == pytest.approx(90, abs=2)


def test_wait__a_request_taken_back_and_made_again_is_the_same_wait(monkeypatch):
    scene = Scene(monkeypatch, 60)
    with pytest.raises(EnvironmentProblem, match="no trial could start"):
        for _ in range(4):
            scene.turn(14, PENDING)
            scene.turn(4, IDLE)


def test_wait__nothing_asked_for_is_no_wait(monkeypatch):
    scene = Scene(monkeypatch, 60)
    scene.turn(300, IDLE)
    assert scene.lines == []


# ---- real Ray


HOLD = """
import sys, time
import ray

ray.init(sys.argv[1], log_to_driver=False)
hold = ray.remote(num_cpus=1)(lambda: time.sleep(600))
holds = [hold.remote(), hold.remote()]
while ray.available_resources().get("CPU"):
    time.sleep(0.1)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def busy(shared_ray, monkeypatch) -> Iterator[Any]:
    """Have another job's tasks hold all CPUs of the cluster; yields what frees them."""
    monkeypatch.setattr(resource_wait, "FIRST_NOTICE_SECONDS", 1.0)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, shared_ray.address]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        assert other.stdin and other.stdout
        try:
            assert other.stdout.readline() == b"held\n"
            yield other.stdin.close
        finally:
            other.kill()


def waiting_study(folder: Any, weights_file: Any, workers: int, wait_seconds: float) -> StudyConfig:
    """Two trials of one worker, or one of two."""
    trials = 3 - workers
    values = study_values(folder, weights_file, trials=trials, reference_trials=["default"])
    values["trial"]["training"] |= {"epochs": 2, "workers": workers, "batch_norm": "frozen"}
    return StudyConfig.from_mapping(values | {"resources": {"wait_seconds": wait_seconds}})


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_waits_visibly_gives_up_and_goes_on(busy, tmp_path, weights_file, workers):
    events: list[Any] = []
    lines: list[str] = []
    config = waiting_study(tmp_path, weights_file, workers, 8)
    started = time.monotonic()
    with pytest.raises(
        EnvironmentProblem, match=r"no trial could start for (8|9|\d\d) s: a trial takes"
    ):
        run_study(config, observer=events.append, on_notice=lines.append)
    assert time.monotonic() - started < 60
    assert lines[0].startswith(f"waiting for {workers} x {{CPU: 1}}: 0 of 2 CPUs on 1 node are")
    ends = {(event.number, event.state) for event in events if isinstance(event, RunFinished)}
    assert (None, "INTERRUPTED") in ends
    assert {state for _, state in ends} == {"INTERRUPTED"}
    assert not any(isinstance(event, MetricsRecorded) for event in events)

    def note(line: str) -> None:
        lines.append(line)
        busy()  # the other job ends

    lines.clear()
    result = run_study(waiting_study(tmp_path, weights_file, workers, 600), on_notice=note)
    assert [line.split(":")[0] for line in lines] == [
        f"waiting for {workers} x {{CPU",
        f"{workers} x {{CPU",
    ]
    assert {trial.number: trial.state for trial in result.trials} == {
        number: "COMPLETE" for number in range(3 - workers)
    }


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_waits_visibly_and_gives_up(busy, tmp_path, weights_file):
    """In a session of the caller's own, which goes on: nothing may train in it later."""
    import ray

    with joined(os.environ["RAY_ADDRESS"]):
        _wait_and_give_up(tmp_path, weights_file)
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
        actors = ray._private.state.actors(job_id=job, actor_state_name="ALIVE").values()
        assert not [a for a in actors if a["ActorClassName"].startswith(("TrainC", "RayTrainW"))]
        busy()


def _wait_and_give_up(tmp_path, weights_file):
    config = waiting_study(tmp_path, weights_file, 2, 8).trial
    lines: list[str] = []
    events: list[Any] = []
    with pytest.raises(EnvironmentProblem, match=r"no trial could start for (8|9|\d\d) s"):
        run_training(
            config,
            "single",
            tmp_path / "studies",
            resources=ResourcesConfig(wait_seconds=8),
            observer=events.append,
            on_notice=lines.append,
        )
    assert lines[0].startswith("waiting for 2 x {CPU: 1}: 0 of 2 CPUs")
    assert [event.state for event in events if isinstance(event, RunFinished)] == ["INTERRUPTED"]
