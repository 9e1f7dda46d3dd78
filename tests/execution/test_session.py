"""Joining a cluster: what reaches its workers, what is refused, what a former job left there."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from functools import cache
from typing import Any

import pytest
from ray._private import services

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.placement_groups import remove_leftovers
from drtune_ray.execution.session import ray_session, worker_environment
from tests.clusters import joined
from tests.ray_fixtures import NODE_PATH, NUM_CPUS

pytestmark = pytest.mark.xdist_group("clusters")

LEAVES_A_GROUP = """
import sys, threading, time
import ray
from ray.util import placement_group

@ray.remote(num_cpus=0)
class Asking:
    def start(self):
        threading.Thread(target=self.ask, daemon=True).start()

    def ask(self):
        while True:
            placement_group([{"CPU": 1}] * 3)
            time.sleep(0.002)

ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
if sys.argv[2] == "ours":
    from drtune_ray.execution.ray_state import register_job
    register_job()
asking = Asking.remote()
ray.get(asking.start.remote())
time.sleep(1)
"""
# Another user's: its job ends, and the actor that made the group lives on.
LIVES_ON = """
import sys
import ray
from ray.util import placement_group

@ray.remote(num_cpus=0)
class Service:
    def start(self):
        self.group = placement_group([{"CPU": 0.01}])
        ray.get(self.group.ready())

ray.init(sys.argv[1], namespace="other", log_to_driver=False, logging_level="ERROR")
service = Service.options(name="service", lifetime="detached").remote()
ray.get(service.start.remote())
"""


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("garbage", r"it must be HOST:PORT, as `ray start --head` says it$"),
        ("ray://somewhere:10001", r"drtune-ray runs on a node of the cluster: give HOST:PORT"),
        ("nohost.invalid:6379", r"nothing answers there \("),
        ("auto", "Could not find any running Ray instance"),
    ],
)
def test_ray_session__an_address_that_is_wrong_is_one_message_at_once(monkeypatch, address, reason):
    # As on a machine on which no cluster runs; the one of the tests does.
    monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: None)
    monkeypatch.setattr(services, "find_gcs_addresses", cache(frozenset))
    monkeypatch.setenv("RAY_ADDRESS", address)
    start = time.monotonic()
    message = rf"^the Ray cluster of RAY_ADDRESS={address} cannot be joined: {reason}"
    with pytest.raises(EnvironmentProblem, match=message), ray_session():
        pass
    assert time.monotonic() - start < 30


def test_ray_session__a_closed_port(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # taken, but nobody listens
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(EnvironmentProblem, match="nothing answers there"), ray_session():
            pass


FAILED_STARTS = {
    "slow": (
        Exception("The current node timed out during startup."),
        "this machine is slow or busy, try again (The current node timed out during startup.)",
    ),
    "temporary folder": (
        OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: x"),
        "its temporary folder /long has too long a path for its sockets: set RAY_TMPDIR=/tmp",
    ),
    "home": (
        PermissionError(errno.EACCES, "Permission denied", "/no/home/.ray"),
        "its token lies below HOME=/no/home ([Errno 13] Permission denied: '/no/home/.ray'): set "
        "HOME to a writable folder",
    ),
    "no home": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/no"),
        "its token lies below HOME=/no/home ([Errno 2] No such file or directory: '/no'): set HOME "
        "to a writable folder",
    ),
    "else": (RuntimeError("no space"), "no space"),
}


# An empty address is none: whoever can override a variable but not remove it sets it to nothing.
@pytest.mark.parametrize("address", [None, ""])
@pytest.mark.parametrize("name", FAILED_STARTS)
def test_ray_session__a_start_that_fails_is_one_message(monkeypatch, name, address):
    import ray

    error, reason = FAILED_STARTS[name]

    def start(where: str, **settings: Any) -> None:
        assert where == "local"
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", "/long")
    monkeypatch.setenv("HOME", "/no/home")
    monkeypatch.setattr(ray, "init", start)
    message = f"^{re.escape(f'Ray cannot be started: {reason}')}$"
    with pytest.raises(EnvironmentProblem, match=message), ray_session():
        pass


def test_worker_environment__what_training_needs_and_nothing_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    found = worker_environment()
    assert "secret" not in repr(found)
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["RAY_CHDIR_TO_TRIAL_DIR"] == "0"


def test_worker_environment__what_the_job_sets_is_not_set_again(monkeypatch):
    """Ray refuses a variable that is set by `ray job submit` and by the driver."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    job = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "2"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert "OMP_NUM_THREADS" not in worker_environment()


# ---- real clusters


def seen_by_worker() -> tuple[dict[str, str], list[str]]:
    return dict(os.environ), sys.path


@pytest.mark.ray
@pytest.mark.slow
def test_ray_session__workers_of_a_joined_cluster_get_the_variables(
    shared_ray, monkeypatch, tmp_path
):
    """The nodes were started elsewhere, without them; of the paths, Ray adds the current one."""
    import ray

    for name in ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, "/shared/checkout"])
    with ray_session() as capacity:
        assert [node.num_cpus for node in capacity.nodes] == [NUM_CPUS]
        assert not capacity.is_local
        found, paths = ray.get(ray.remote(seen_by_worker).remote())
    assert found["OMP_NUM_THREADS"] == "7"
    assert found["RAY_CHDIR_TO_TRIAL_DIR"] == "0"
    assert found["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.25"
    assert found["PYTHONPATH"] == NODE_PATH
    assert "/shared/checkout" in paths
    assert str(tmp_path) not in paths and "" not in paths
    assert "AWS_SECRET_ACCESS_KEY" not in found


@pytest.mark.ray
@pytest.mark.slow
def test_ray_session__another_version_of_ray_is_one_message(shared_ray, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "__version__", "2.59.0")
    match = r"^the Ray cluster .* cannot be joined: Version mismatch: .*Ray: 2\.59\.0"
    with pytest.raises(EnvironmentProblem, match=match) as refused, ray_session():
        pass
    assert "\n" not in str(refused.value)
    assert not ray.is_initialized()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_session__frees_what_a_job_asked_for_while_it_was_ending(shared_ray):
    import ray
    from ray import PlacementGroupID
    from ray.util import placement_group_table
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    def groups() -> list[Any]:
        return [g for g in placement_group_table().values() if g["state"] != "REMOVED"]

    def run(script: str, *arguments: str) -> None:
        subprocess.run([sys.executable, "-c", script, shared_ray.address, *arguments], check=True)

    def leave_groups(whose: str) -> None:
        """Until one was asked for at the very moment."""
        for _ in range(10):
            run(LEAVES_A_GROUP, whose)
            with joined(shared_ray.address):
                if len(groups()) > 1:  # besides the service's
                    return
        raise AssertionError("Ray has learned to clean this: remove_leftovers may go")

    run(LIVES_ON)
    try:
        leave_groups("ours")
        with ray_session():
            assert [g["state"] for g in groups()] == ["CREATED"]  # the service's
            assert remove_leftovers() == 0
        leave_groups("of another program")
        with ray_session():
            assert len(groups()) > 1
    finally:
        with joined(shared_ray.address):
            ray.kill(ray.get_actor("service", namespace="other"))
            for group in groups():
                key = bytes.fromhex(group["placement_group_id"])
                remove_placement_group(PlacementGroup(PlacementGroupID(key)))
