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
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.util.placement_group import placement_group

from drtune_ray.config.study import ResourcesConfig, StudyConfig
from drtune_ray.config.trial import TrainingConfig
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.capacity import Capacity, Node
from drtune_ray.execution.failures import outcome_of
from drtune_ray.execution.placement_groups import check_state_api, remove_orphans
from drtune_ray.execution.ray_train.worker_group import train_environment
from drtune_ray.execution.ray_tune.run import tune_trainable
from drtune_ray.execution.ray_tune.schedulers import StudyScheduler
from drtune_ray.execution.session import ray_session, set_environment
from drtune_ray.execution.worker import WorkerContext
from drtune_ray.study.run import run_study
from drtune_ray.tracking.events import RunFinished
from drtune_ray.values import to_yaml
from tests import leftovers
from tests.leftovers import free_port
from tests.study.test_study import study_values
from tests.survival import COMMAND, Killed, kill

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# What Ray calls the processes.
WORKER, CONTROLLER, TRIAL_DRIVER = (
    b"ray::RayTrainWorker",
    b"ray::TrainController",
    b"ray::ImplicitFunc",
)


def nested_study(killed: Any, num_trials: int = 1, **changes: Any) -> Killed:
    """Two workers a trial, one trial at a time, in processes of their own."""
    resources = {"trials_at_a_time": 1} | changes.pop("resources", {})
    environment = {"SABOTAGE_STEP_SECONDS": "0.1"}
    study: Killed = killed(
        environment=environment,
        trials=num_trials,
        resources=resources,
        **changes,
    )
    study.values["trial"]["training"] |= {"workers": 2, "batch_norm": "frozen"}
    study.file.write_text(to_yaml(study.values))
    return study


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


@pytest.mark.parametrize("num_stops", [3, pytest.param(20, marks=pytest.mark.chaos)])
@pytest.mark.timeout(900)
def test_stopped_trials_give_everything_back(tmp_path, weights_file, monkeypatch, num_stops):
    def stop_first(self: Any, tune_controller: Any, trial: Any, result: Any) -> str:
        return "STOP" if trial.config["number"] < num_stops else "CONTINUE"

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


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.chaos) for n in (1, 2))])
@pytest.mark.parametrize("title", [WORKER, CONTROLLER, TRIAL_DRIVER])
def test_a_process_of_a_trial_is_killed(killed, title, seed):
    moments = random.Random(seed)
    study = nested_study(killed)
    driver = study.start()
    num_epochs = moments.randrange(1, 6)
    study.wait_for(lambda: study.num_trained() > num_epochs, "training", 90)
    time.sleep(moments.uniform(0, 0.5))
    kill(moments.choice(titled(study, title)))
    output = study.finish(driver)
    assert output.count("goes on from its last save") == 1
    study.check(num_lost=1)


def test_sigterm_to_a_worker_saves_at_the_next_step_and_goes_on(killed):
    study = nested_study(killed)
    driver = study.start()
    study.wait_for(lambda: study.num_trained("step") > 3, "training", 90)
    kill(titled(study, WORKER)[1], signal.SIGTERM)
    study.finish(driver)
    assert set(study.trained("step").values()) == {1}  # not one step is lost
    study.check(num_lost=0)


@pytest.fixture
def training(tmp_path, killed) -> Killed:
    """`drtune-ray train` on two workers, in processes of its own."""
    study = nested_study(killed)
    study.file.write_text(to_yaml(study.values["trial"]))
    study.folder = tmp_path / "studies" / "single"
    places = ["--storage", str(tmp_path / "studies"), "--name", "single"]
    study.command = [COMMAND, "train", str(study.file), *places]
    return study


def test_the_controller_of_a_training_is_killed(training):
    driver = training.start()
    training.wait_for(lambda: training.num_trained() > 2, "training", 90)
    (controller,) = titled(training, CONTROLLER)
    kill(controller)
    output = training.finish(driver)
    assert output.count("goes on from its last save") == 1
    assert "Traceback" not in output
    assert training.num_trained() <= 8 + 1  # an epoch was trained twice at most
    training.wait_for(lambda: not training.left(), "all processes gone", 20)


def test_ctrl_c_saves_a_training_at_its_next_step(training):
    driver = training.start()
    training.wait_for(lambda: training.num_trained("step") > 5, "training", 90)
    before = training.num_trained("step")
    driver.send_signal(signal.SIGINT)
    output = training.finish(driver, expected=130)
    assert "The same command goes on" in output
    num_later = training.num_trained("step") - before
    training.run()
    # What was trained after the save, until the workers ended, is trained again; nothing before.
    repeated = [count for count in training.trained("step").values() if count > 1]
    assert len(repeated) <= num_later and set(repeated) <= {2}
    training.wait_for(lambda: not training.left(), "all processes gone", 20)


def test_a_point_that_exhausts_a_gpu_is_a_result(killed):
    study = nested_study(killed, 2)
    study.order("exhaust@2")
    output = study.run()
    assert "goes on from its last save" not in output
    study.check(num_lost=0, states={0: "PRUNED", 1: "COMPLETE"})
    first = study.trials()[0]
    assert first.user_attrs["outcome"] == "out of memory"
    assert first.constraints == {"trains": 1.0}
    assert sorted(first.intermediate_values) == [1, 2]


@pytest.mark.parametrize("how", ["hang", "stop"])
def test_a_worker_that_hangs_or_does_not_run(killed, how):
    study = nested_study(killed, resources={"hang_seconds": 6})
    study.order(f"{how}@2")
    output = study.run()
    assert "hung for 6 s" in output
    study.check(num_lost=1)


def test_groups_of_dead_creators_are_removed(tmp_path):
    """Also one that was still waiting for resources, of which nobody else knows."""

    @ray.remote(num_cpus=0)
    class Controller:
        def ask(self, num_cpus: int) -> None:
            self.group = placement_group([{"CPU": num_cpus}])

    with ray_session():
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


def test_a_cluster_without_a_dashboard_is_refused():
    """Also beside one that has it, which Ray would ask of its own accord."""
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    other = Cluster(initialize_head=True, head_node_args=head)
    try:
        refused = pytest.raises(EnvironmentProblem, match="need the dashboard of the Ray cluster")
        with ray_session(), refused:
            check_state_api()
    finally:
        other.shutdown()


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


def test_four_trials_share_a_gpu(tmp_path, weights_file):
    """Scheduling needs no device: Ray believes what it is told."""
    resources = {"gpus_per_trial": 0.25}
    config = StudyConfig.from_mapping(study_values(tmp_path, weights_file, resources=resources))
    context = WorkerContext({}, tmp_path, 1, "cuda", study_id="gpu", hang_seconds=1.0)
    trainable = tune_trainable(config, context, Capacity(nodes=(Node(8, 1),)))
    bundles = trainable.default_resource_request({}).bundles
    assert bundles == [{"CPU": 1, "GPU": 0.25}]
    set_environment()
    ray.init("local", num_cpus=8, num_gpus=1, log_to_driver=False, include_dashboard=False)
    try:
        trials = [placement_group(bundles) for _ in range(5)]
        assert all(trial.wait(20) for trial in trials[:4])
        assert not trials[4].wait(2)
    finally:
        ray.shutdown()
