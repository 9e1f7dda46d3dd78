"""What the package needs of Ray's inside, tried on the installed Ray: the first test to read after
an upgrade. Each failure names the function of ours that the upgrade broke.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import PlacementGroupID
from ray._private.node import Node as RayNode
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.training import TrainingConfig
from drtune_ray.execution import ray_state
from drtune_ray.execution.capacity import Demand, Node
from drtune_ray.execution.ray_train import worker_group
from drtune_ray.execution.ray_tune import patches, run
from tests.clusters import joined, token_auth
from tests.ray_fixtures import NUM_CPUS

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("clusters")]


@contextmanager
def broken_by_upgrade(*functions: Callable[..., Any]) -> Iterator[None]:
    """Within, whatever fails is reported as an upgrade of Ray that broke these functions."""
    names = " and ".join(f"{f.__module__}.{f.__qualname__}" for f in functions)
    try:
        yield
    except Exception as error:
        raise AssertionError(
            f"{names} does not work with Ray {ray.__version__}: an upgrade of Ray broke it "
            f"({type(error).__name__}: {error})"
        ) from error


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@ray.remote(num_cpus=0)
class Creator:
    """An actor that makes a placement group."""

    def create(self) -> None:
        self.group = placement_group([{"CPU": 1}])
        assert self.group.wait(30)


class Answering:
    def answer(self) -> str:
        return "here"


class RayTrainWorker(Answering):
    """Named as Ray Train's workers are."""


class TrainController(Answering):
    """Named as Ray Train's controllers are."""


@pytest.fixture(scope="module")
def cluster(ray_cluster: Any) -> Iterator[Any]:
    """The shared cluster, which this process has joined."""
    with token_auth(), joined(ray_cluster.address):
        yield ray_cluster


def test_every_public_function_is_called_here() -> None:
    public = {
        name
        for name, function in inspect.getmembers(ray_state, inspect.isfunction)
        if function.__module__ == ray_state.__name__ and not name.startswith("_")
    }
    called = set(re.findall(r"\b(\w+)\(", Path(__file__).read_text()))
    assert public - called == set()


def test_what_workers_import() -> None:
    with broken_by_upgrade(ray_state.paths_of_workers):
        config = ray_state.paths_of_workers(["/first", "/second"])
        config._py_driver_sys_path.extend(["/current"])  # as ray.init does
        assert list(config._get_proto_job_config().py_driver_sys_path) == ["/second", "/first"]


def test_what_was_started_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own end of its processes; that they end is seen in `make test-chaos`."""
    asked = []
    with broken_by_upgrade(ray_state.kill_started):
        bind = inspect.signature(RayNode.kill_all_processes).bind
        node = SimpleNamespace(kill_all_processes=lambda **how: asked.append(bind(None, **how)))
        monkeypatch.setattr(ray._private.worker.global_worker, "node", node, raising=False)
        ray_state.kill_started()
    assert len(asked) == 1


def test_the_file_of_the_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert ray_state.token_file() == Path("~/.ray/auth_token").expanduser()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert ray_state.token_file() == tmp_path / "token"


def test_key_value_store(cluster: Any) -> None:
    functions = (ray_state.write_value, ray_state.read_value, ray_state.keys_below)
    with broken_by_upgrade(*functions, ray_state.remove_below):
        ray_state.write_value("test/a", "1")
        ray_state.write_value("test/b", "2")
        assert ray_state.read_value("test/a") == "1"
        assert ray_state.keys_below("test/") == ["test/a", "test/b"]
        ray_state.remove_below("test/")
        assert ray_state.keys_below("test/") == []
        assert ray_state.read_value("test/a") is None


def test_jobs(cluster: Any) -> None:
    with broken_by_upgrade(ray_state.own_job, ray_state.register_job, ray_state.forget_job):
        former = ray_state.own_job()
        ray_state.register_job()
        ray.shutdown()
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        assert ray_state.own_job() != former
    with broken_by_upgrade(ray_state.registered_ended_jobs, ray_state.forget_job):
        wait_for(lambda: former in ray_state.registered_ended_jobs())
        ray_state.forget_job(former)
        assert former not in ray_state.registered_ended_jobs()


def test_nodes(cluster: Any) -> None:
    with broken_by_upgrade(ray_state.read_capacity):
        capacity = ray_state.read_capacity(is_local=False)
        assert capacity.nodes == (Node(NUM_CPUS, 0),)
        assert (capacity.groups, capacity.limits) == ((), ())
        assert not capacity.has_autoscaler and capacity.num_trial_drivers is None
    with broken_by_upgrade(ray_state.free_text):
        assert ray_state.free_text() == f"{NUM_CPUS} of {NUM_CPUS} CPUs on 1 node"
    with broken_by_upgrade(ray_state.is_drained):
        (node,) = (node["NodeID"] for node in ray.nodes() if node["Alive"])
        assert ray_state.state.get_draining_nodes() == {}  # `is_drained` hides an error
        assert not ray_state.is_drained(node)
    with broken_by_upgrade(ray_state.own_cluster), ray_state.own_cluster():
        assert os.environ["RAY_ADDRESS"] == cluster.address
        assert "RAY_ADDRESS" in get_env_vars_to_propagate()
    with broken_by_upgrade(ray_state.session_folder):
        assert (ray_state.session_folder() / "logs").is_dir()


def test_placement_groups_and_actors(cluster: Any) -> None:
    own = placement_group([{"CPU": 1}])
    creator = Creator.remote()
    assert own.wait(30)
    ray.get(creator.create.remote())
    with broken_by_upgrade(ray_state.placements):
        found = ray_state.placements(Demand(1, 1, 0))
        assert found == ray_state.Placements(is_pending=False, is_placed=True)
    with broken_by_upgrade(ray_state.placement_groups, ray_state.has_no_living_creator):
        groups = list(ray_state.placement_groups())
        jobs = {group.creator_job_id.hex() for group in groups}
        assert jobs == {ray_state.own_job()}
        by_creator = {ray_state.has_no_living_creator(group): group for group in groups}
        assert set(by_creator) == {True, False}  # by this driver, and by the actor
        assert by_creator[True].creator_actor_id in ray_state.BY_DRIVER
        assert not by_creator[False].is_detached and not by_creator[False].creator_actor_dead
    with broken_by_upgrade(ray_state.end_actor):
        ray_state.end_actor(creator._actor_id.hex())
        wait_for(lambda: all(map(ray_state.has_no_living_creator, ray_state.placement_groups())))
    for group in ray_state.placement_groups():
        key = PlacementGroupID(group.placement_group_id)
        remove_placement_group(PlacementGroup(key))
    wait_for(lambda: not [*ray_state.placement_groups()])


def test_actors_of_ray_train(cluster: Any) -> None:
    worker, controller = (
        ray.remote(num_cpus=0)(kind).remote() for kind in (RayTrainWorker, TrainController)
    )
    ray.get([worker.answer.remote(), controller.answer.remote()])
    with broken_by_upgrade(ray_state.num_train_workers, ray_state.train_controllers):
        assert ray_state.num_train_workers() == 1
        assert ray_state.train_controllers() == {controller._actor_id.hex()}
    ray.kill(worker)
    ray.kill(controller)
    with broken_by_upgrade(ray_state.num_train_workers, ray_state.train_controllers):
        wait_for(
            lambda: (ray_state.num_train_workers(), ray_state.train_controllers()) == (0, set())
        )


def test_the_classes_of_ray_train_have_their_names() -> None:
    from ray.train.v2._internal.execution.controller import TrainController as Controller
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker as Worker

    with broken_by_upgrade(ray_state.num_train_workers, ray_state.train_controllers):
        assert Worker.__name__ == ray_state.WORKER_CLASS
        assert Controller.__name__ == ray_state.CONTROLLER_CLASS


TOKEN = """
from drtune_ray.execution.ray_state import sends_token, token_of_this_machine

print(sends_token(), token_of_this_machine())
"""


def test_authentication(cluster: Any) -> None:
    with broken_by_upgrade(ray_state.head_refuses):
        own_token = ray_state.token_of_this_machine()
        assert own_token and not ray_state.head_refuses(cluster.address, own_token, 10)
        assert ray_state.head_refuses(cluster.address, None, 10)
        with pytest.raises(ConnectionError, match=r"^[A-Z_]+$"):
            ray_state.head_refuses("127.0.0.1:9", None, 10)
    with broken_by_upgrade(ray_state.sends_token, ray_state.token_of_this_machine):
        # In processes of their own: Ray remembers what it has read.
        assert printed_with_token(RAY_AUTH_MODE="token") == ["True", "a" * 32]
        assert printed_with_token() == ["False", "a" * 32]


def printed_with_token(**variables: str) -> list[str]:
    """What `TOKEN` prints in a process whose environment holds a token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"RAY_AUTH_TOKEN": "a" * 32} | variables
    command = [sys.executable, "-c", TOKEN]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.split()


def test_keep_token_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray writes it for every user of the machine to read."""
    from ray._private.authentication.authentication_token_setup import generate_and_save_token

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(ray_state, "token_of_this_machine", lambda: None)
    token = tmp_path / ".ray" / "auth_token"
    with broken_by_upgrade(ray_state.keep_token_private):
        ray_state.keep_token_private()
        generate_and_save_token()
        assert len(token.read_text()) == 64
        assert oct(token.stat().st_mode)[-3:] == "600"
        assert oct(token.parent.stat().st_mode)[-3:] == "700"
    token.chmod(0o644)  # by an earlier version
    monkeypatch.setattr(ray_state, "token_of_this_machine", token.read_text)
    ray_state.keep_token_private()
    assert oct(token.stat().st_mode)[-3:] == "600"


def test_keep_token_private__without_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray_state.keep_token_private()
    assert list(tmp_path.iterdir()) == []


# ---- what is changed from outside


def test_what_tune_is_patched_at() -> None:
    from ray.air.execution._internal import RayActorManager
    from ray.tune.analysis import ExperimentAnalysis
    from ray.tune.experiment import Trial

    with broken_by_upgrade(patches.nothing_unpickled, patches.failure_of):
        former = Trial.handle_error, Trial.get_pickled_error, ExperimentAnalysis._load_trials
        assert list(inspect.signature(Trial.handle_error).parameters) == ["self", "exc"]
        assert list(inspect.signature(Trial.get_pickled_error).parameters) == ["self"]
        assert list(inspect.signature(ExperimentAnalysis._load_trials).parameters) == ["self"]
        trial = Trial("__fake", stub=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trial, "handle_error", lambda trial, exc: None)  # needs a storage
            with patches.nothing_unpickled():
                trial.handle_error(KeyError("x"))
        assert patches.failure_of(trial, Path("/nonexistent")).error == "KeyError: 'x'"
        assert former == (
            Trial.handle_error,
            Trial.get_pickled_error,
            ExperimentAnalysis._load_trials,
        )
    with broken_by_upgrade(patches.lost_processes_are_failures):
        for name in ("_actor_task_failed", "_actor_start_failed"):
            parameters = inspect.signature(getattr(RayActorManager, name)).parameters
            assert "exception" in parameters
        seen: list[Exception] = []

        def failed(manager: Any, *, exception: Exception, **of_what: Any) -> None:
            seen.append(exception)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RayActorManager, "_actor_task_failed", failed)
            with patches.lost_processes_are_failures():
                error = ray.exceptions.OutOfMemoryError("1 worker(s) were killed")
                RayActorManager._actor_task_failed(None, exception=error)
        assert isinstance(seen[0], patches.ProcessLost)


def test_what_tune_hands_on_to_actors() -> None:
    from ray.tune.execution import class_cache

    with broken_by_upgrade(run.tune_trainable):
        assert isinstance(class_cache.ENV_VARS_TO_PROPAGATE, set)


def test_what_ray_train_calls_and_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

    ours = worker_group.WorkerGroupCallbacks
    with broken_by_upgrade(ours):
        methods = [name for name in vars(ours) if not name.startswith("_")]
        assert methods
        for name in methods:
            base = next(b for b in (WorkerGroupCallback, ControllerCallback) if hasattr(b, name))
            expected = list(inspect.signature(getattr(base, name)).parameters)
            assert list(inspect.signature(getattr(ours, name)).parameters) == expected, name
    here = SimpleNamespace(gcs_address="here:1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    with broken_by_upgrade(worker_group.train_environment):
        resources = ResourcesConfig()
        with worker_group.train_environment(resources, TrainingConfig(workers=2)):
            told = constants.get_env_vars_to_propagate()
        names = ("WORKER_HEALTH_CHECK_TIMEOUT_S", "COLLECTIVE_TIMEOUT_S")
        names += ("WORKER_GROUP_START_TIMEOUT_S",)
        assert {f"RAY_TRAIN_{name}" for name in names} < told.keys()
        assert told["RAY_ADDRESS"] == "here:1"
