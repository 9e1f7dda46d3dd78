"""Trials of several workers: stopped, killed, hung, out of memory; nothing lost, nothing leaked."""

from __future__ import annotations

import errno
import os
import pickle
import random
import signal
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.util.placement_group import placement_group

from drtune_ray.config.study import ResourcesConfig, StudyConfig
from drtune_ray.config.training import TrainingConfig
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.capacity import Capacity, Node
from drtune_ray.execution.failures import outcome_of
from drtune_ray.execution.placement_groups import check_state_api, remove_orphans
from drtune_ray.execution.ray_train.worker_group import train_environment
from drtune_ray.execution.ray_tune.run import tune_trainable
from drtune_ray.execution.ray_tune.schedulers import StudyScheduler
from drtune_ray.execution.session import ray_session
from drtune_ray.execution.worker_context import WorkerContext
from drtune_ray.study.run import run_study
from drtune_ray.tracking.events import RunFinished
from drtune_ray.values import to_yaml
from tests import leftovers
from tests.clusters import joined
from tests.study.test_study import mlflow_runs, study_values
from tests.survival import COMMAND, CONTROLLER, RESUMED, TRIAL_DRIVER, WORKER, Killed, kill

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HANG_SECONDS = 20


def titled(study: Killed, title: bytes) -> list[int]:
    return sorted(pid for pid, text in study.processes().items() if text.startswith(title))


class Meter:
    """An observer: how long until the CPUs of a trial that ended are free, and what lives then."""

    def __init__(self) -> None:
        self.ended: dict[int, float] = {}
        self.seconds: dict[int, float] = {}
        self.alive: list[Counter[str]] = []
        self.memory: list[dict[str, int]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Look no more."""
        self._is_over.set()
        self._thread.join()

    def __call__(self, event: Any) -> None:
        if isinstance(event, RunFinished) and event.number is not None:
            self.ended[event.number] = time.monotonic()

    def _watch(self) -> None:
        while not self._is_over.wait(0.05):
            for number in self.ended.keys() - self.seconds.keys():
                if ray.is_initialized() and ray.available_resources().get("CPU") == 2.0:
                    self.seconds[number] = time.monotonic() - self.ended[number]
                    self.alive.append(leftovers.live_groups() + leftovers.live_actors())
                    self.memory.append(leftovers.memory_mib())


@pytest.mark.xdist_group("workers")
# Twenty see a growth of memory; one sees that a trial's processes and resources are given back.
@pytest.mark.parametrize("num_stops", [1, pytest.param(20, marks=pytest.mark.chaos)])
def test_stopped_trials_give_everything_back(
    shared_ray, tmp_path, weights_file, monkeypatch, num_stops
):
    def stop_first(self: Any, tune_controller: Any, trial: Any, result: Any) -> str:
        return "STOP" if trial.config["number"] < num_stops else "CONTINUE"

    with joined(shared_ray.address):
        leftovers.assert_cluster_is_empty()
    monkeypatch.setattr(StudyScheduler, "on_trial_result", stop_first)
    values = study_values(
        tmp_path,
        weights_file,
        trials=num_stops + 1,
        reference_trials=[],
        resources={"trials_at_a_time": 1},
    )
    values["trial"]["training"] |= {"workers": 2, "epochs": 20, "batch_norm": "frozen"}
    meter = Meter()
    try:
        result = run_study(StudyConfig.from_mapping(values), observer=meter)
    finally:
        meter.end()
    print("seconds until the CPUs were free:", [round(s, 1) for s in meter.seconds.values()])
    print("alive then:", *map(dict, meter.alive), sep="\n  ")
    print("MiB after the first and last stop:", meter.memory[0], meter.memory[num_stops - 1])
    assert [t.state for t in result.trials] == ["PRUNED"] * num_stops + ["COMPLETE"]
    assert set(meter.seconds) >= set(range(num_stops))
    assert max(meter.seconds.values()) < 10
    # The next trial's driver, and the cleaners of the last one or two: nothing piles up.
    assert max(alive.total() for alive in meter.alive) <= 4
    if num_stops > 10:
        first, last = meter.memory[2], meter.memory[num_stops - 1]
        assert all(last[name] - first[name] < 4 * num_stops for name in first), (first, last)
    for trial in result.trials:
        folder = result.folder / "trials" / f"{trial.number:05d}"
        assert [path.name for path in folder.iterdir()] == ["best.ckpt"]


HITS = [  # (number of each trial's hits that are made, seed of their moments)
    pytest.param(1, 0, id="once"),
    *(pytest.param(2, seed, id=f"twice-{seed}", marks=pytest.mark.chaos) for seed in range(4)),
]


@pytest.mark.xdist_group("workers-hits")
@pytest.mark.parametrize(("num_hits", "seed"), HITS)
def test_trials_of_two_workers_whose_processes_are_hit(killed, num_hits, seed):
    """One trial at a time, each hit once, or as often as may be forgiven."""
    moments = random.Random(seed)
    study = killed(
        environment={"SABOTAGE_STEP_SECONDS": "0.1"},
        trials=3,
        resources={"trials_at_a_time": 1, "hang_seconds": HANG_SECONDS},
    )
    study.write(workers=2, batch_norm="frozen")
    driver = study.start()

    # A worker is killed, and then the controller.
    for number, title in enumerate((WORKER, CONTROLLER)[:num_hits], 1):
        study.wait_for_epochs(1)
        time.sleep(moments.uniform(0, 0.4))
        kill(moments.choice(titled(study, title)))
        study.wait_until_resumed(number)
    assert study.num_repeated("epoch") <= num_hits

    # The second trial: a worker hangs, and later one does not run.
    study.wait_for(lambda: max_epoch(study) >= 5, "the first trial's last epochs")
    study.order(*("hang@2", "stop@4")[:num_hits])
    study.wait_until_resumed(2 * num_hits)
    assert study.log.read_text().count(f"{RESUMED}: hung for {HANG_SECONDS} s") == num_hits
    assert study.num_repeated("epoch") <= 2 * num_hits

    # The third: a worker is terminated and saves at its next step, then the trial's own driver is
    # killed, and in the end the GPU's memory is exhausted: a result, which is not tried again.
    study.wait_for(lambda: len(digests(study)) == 3, "the third trial")
    if num_hits > 1:
        terminate_worker(study)
    time.sleep(moments.uniform(0, 0.4))
    num_resumed = study.log.read_text().count(RESUMED)
    kill(moments.choice(titled(study, TRIAL_DRIVER)))
    study.order("exhaust@6")
    output = study.finish(driver)
    assert output.count(RESUMED) == num_resumed + 1
    assert "1 at a time" in output and "Best of 3 trials" in output
    states = {0: "COMPLETE", 1: "COMPLETE", 2: "PRUNED"}
    study.check(num_lost=2 * num_hits + 1, states=states)
    last = study.trials()[2]
    assert last.user_attrs["outcome"] == "out of memory"
    assert last.constraints == {"trains": 1.0}
    assert sorted(last.intermediate_values) == [1, 2, 3, 4, 5, 6]


def terminate_worker(study: Killed) -> None:
    """Terminate a worker, which saves at its next step: not one step is lost."""
    repeated, steps = study.num_repeated(), study.num_trained("step")
    kill(titled(study, WORKER)[1], signal.SIGTERM)
    study.wait_for(lambda: study.num_trained("step") > steps + 6, "training")
    assert study.num_repeated() == repeated


def digests(study: Killed) -> set[str]:
    """The trials of which a step was trained."""
    return {digest for digest, _, _ in study.trained("step")}


def max_epoch(study: Killed) -> int:
    """The last epoch that was trained, of any trial."""
    return max(epoch for _, epoch, _ in study.trained())


@pytest.mark.xdist_group("workers")
def test_a_training_whose_controller_is_killed_and_that_is_interrupted(killed, tmp_path):
    """`drtune-ray train` on two workers, in processes of its own."""
    study = killed(environment={"SABOTAGE_STEP_SECONDS": "0.1"})
    study.write(workers=2, batch_norm="frozen")
    study.file.write_text(to_yaml(study.values["trial"]))
    study.folder = tmp_path / "studies" / "single"
    places = ["--storage", str(tmp_path / "studies"), "--name", "single"]
    study.command = [COMMAND, "train", str(study.file), *places]
    driver = study.start()
    study.wait_for_epochs(2)
    (controller,) = titled(study, CONTROLLER)
    kill(controller)
    study.wait_until_resumed(1)
    assert study.num_repeated("epoch") <= 1

    repeated, before = study.num_repeated(), study.num_trained("step")
    driver.send_signal(signal.SIGINT)
    output = study.finish(driver, expected=130)
    assert output.count(RESUMED) == 1
    assert "The same command resumes" in output and "Traceback" not in output
    num_later = study.num_trained("step") - before
    client, (run,), _ = mlflow_runs(study.folder)
    assert run.info.status == "KILLED"
    study.hurry()
    output = study.run()
    assert "epoch 8/8" in output and "Traceback" not in output
    # What was trained after the save, until the workers ended, is trained again; nothing before.
    assert study.num_repeated() - repeated <= num_later
    assert {epoch for _, epoch, _ in study.trained()} == set(range(8))
    _, (run,), _ = mlflow_runs(study.folder)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "val_accuracy")
    assert sorted(metric.step for metric in history) == list(range(1, 9))
    study.wait_for(lambda: not study.left(), "all processes gone", 20)


@pytest.mark.xdist_group("workers")
def test_groups_of_dead_creators_are_removed(shared_ray):
    """Also one that was still waiting for resources, of which nobody else knows."""

    @ray.remote(num_cpus=0)
    class Controller:
        def ask(self, num_cpus: int) -> None:
            self.group = placement_group([{"CPU": num_cpus}])

    with ray_session():
        leftovers.assert_cluster_is_empty()
        own = placement_group([{"CPU": 1}])
        alive, dead = Controller.remote(), Controller.remote()
        ray.get([alive.ask.remote(1), dead.ask.remote(4096)])
        assert own.wait(30)
        before = leftovers.live_groups()
        assert remove_orphans() == 0
        ray.kill(dead)
        deadline = time.monotonic() + 20
        while not (num_removed := remove_orphans()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (before, num_removed) == ({"CREATED": 2, "PENDING": 1}, 1)
        assert leftovers.live_groups() == {"CREATED": 2}


@pytest.mark.xdist_group("workers")
def test_a_cluster_without_a_dashboard_is_refused(ray_cluster, monkeypatch):
    """Also beside one that has it, which Ray would ask of its own accord."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    refused = pytest.raises(EnvironmentProblem, match="need the dashboard of the Ray cluster")
    with ray_session(), refused:
        check_state_api()


@pytest.mark.xdist_group("workers-hits")
def test_ray_train_asks_its_own_cluster(tmp_path, monkeypatch):
    """Of several on a machine, and not the one that was started last."""
    resources, training = ResourcesConfig(), TrainingConfig(workers=2)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here:1"))
    with train_environment(resources, training):
        told = get_env_vars_to_propagate()
    assert told["RAY_ADDRESS"] == "here:1"
    assert float(told["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) >= resources.wait_seconds
    assert os.environ["RAY_ADDRESS"] == "somewhere:1"
    assert "RAY_TRAIN_COLLECTIVE_TIMEOUT_S" not in os.environ


@pytest.mark.xdist_group("workers-hits")
def test_the_error_of_the_worker_that_failed_names_the_outcome():
    """The others lost sight of it, and their errors may come first."""
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:4242")
    killed = WorkerHealthCheckFailedError("a check failed", ActorDiedError())
    full = OSError(errno.ENOSPC, "No space left on device")
    stopped = WorkerHealthCheckTimeoutError(
        "A worker health check has been hanging for 6.3 seconds"
    )
    for failure, outcome in [
        (killed, "process killed"),
        (full, "disk full"),
        (stopped, "hung for 6 s"),
        (ValueError("wrong"), "machine failure"),
    ]:
        error = WorkerGroupError("failed", {0: lost, 1: failure})
        assert outcome_of(pickle.loads(pickle.dumps(error))) == outcome


@pytest.mark.xdist_group("workers")
def test_four_trials_share_a_gpu(shared_ray, tmp_path, weights_file):
    """Scheduling needs no device: Ray believes what it is told."""
    resources = {"gpus_per_trial": 0.25}
    config = StudyConfig.from_mapping(study_values(tmp_path, weights_file, resources=resources))
    context = WorkerContext({}, tmp_path, 1, "cuda", study_id="gpu", hang_seconds=1.0)
    trainable = tune_trainable(config, context, Capacity(nodes=(Node(8, 1),)))
    bundles = trainable.default_resource_request({}).bundles
    assert bundles == [{"CPU": 1, "GPU": 0.25}]
    node = shared_ray.add_node(num_cpus=8, num_gpus=1)
    try:
        with joined(shared_ray.address):
            trials = [placement_group(bundles) for _ in range(5)]
            assert all(trial.wait(120) for trial in trials[:4])
            assert not trials[4].wait(2)
    finally:
        shared_ray.remove_node(node)
