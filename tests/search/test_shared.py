"""A storage that is another folder on another node is found out before the first trial."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from drtune_ray.config import StudyConfig
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.search.nodes import Capacity, Node
from drtune_ray.search.shared import (
    TOKEN_NAME,
    answer,
    check_token,
    needs_shared_storage,
    shared_folder,
)
from drtune_ray.search.study import run_study
from tests.search.clusters import cluster_of
from tests.search.test_study import study_values

JOINED = Capacity((Node(1, 0), Node(1, 0)))
VERSION = "0.1.0"


def can_mount(folder: Path) -> bool:
    done = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True
    )
    return done.returncode == 0


def test_needs_shared_storage__only_where_nodes_have_nothing_else():
    assert needs_shared_storage(JOINED, None)
    assert not needs_shared_storage(JOINED, "s3://bucket/studies")
    assert not needs_shared_storage(Capacity((Node(1, 0),), is_local=True), None)


def test_answer__reads_and_writes(tmp_path):
    (tmp_path / TOKEN_NAME).write_text("token")
    assert answer(str(tmp_path), "token", "answer", VERSION) == ""
    assert (tmp_path / "answer").read_text() == "token"


def test_answer__says_what_is_wrong(tmp_path):
    assert "cannot read what the driver wrote" in answer(str(tmp_path), "token", "answer", VERSION)
    (tmp_path / TOKEN_NAME).write_text("of another driver")
    assert "holds something else" in answer(str(tmp_path), "token", "answer", VERSION)
    (tmp_path / TOKEN_NAME).write_text("token")
    assert "cannot write" in answer(str(tmp_path), "token", "no/answer", VERSION)
    assert "has drtune-ray 0.1.0, the driver 9.9" in answer(str(tmp_path), "token", "a", "9.9")


def test_check_token__names_the_storage(tmp_path):
    check_token(tmp_path, None)
    (tmp_path / TOKEN_NAME).write_text("token")
    check_token(tmp_path, "token")
    with pytest.raises(
        EnvironmentProblem, match=rf"{tmp_path.parent} is not shared with node \S+: "
    ):
        check_token(tmp_path, "another")


def test_shared_folder__one_machine_is_not_asked(tmp_path):
    with shared_folder(tmp_path, Capacity((Node(1, 0),), is_local=True), None) as token:
        assert token is None
        assert not list(tmp_path.iterdir())


# ---- two nodes on this machine; the second has a file system of its own over the storage


@contextmanager
def node_elsewhere(address: str, storage: Path, temporary: Path) -> Iterator[None]:
    """A node for which a tmpfs lies over the storage."""
    start = (
        f"mount -t tmpfs none {storage} && exec {Path(sys.executable).with_name('ray')} start "
        f"--address={address} --num-cpus=1 --object-store-memory=100000000 --block"
    )
    with (temporary / "node.log").open("w") as log:
        node = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", start], stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        try:
            node.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def wait_for_nodes(number: int, seconds: float = 60.0) -> None:
    import ray

    deadline = time.monotonic() + seconds
    while sum(node["Alive"] for node in ray.nodes()) < number:
        assert time.monotonic() < deadline, "the node did not join"
        time.sleep(0.2)


@contextmanager
def joined(address: str) -> Iterator[None]:
    import ray

    ray.init(address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_storage_of_its_own_is_refused_before_the_first_trial(
    tmp_path, weights_file, monkeypatch
):
    storage = tmp_path / "studies"
    storage.mkdir()
    if not can_mount(storage):
        pytest.skip("no mount namespaces here")
    config = StudyConfig.from_mapping(study_values(tmp_path, weights_file))
    with cluster_of([1]) as cluster, node_elsewhere(cluster.address, storage, tmp_path):
        with joined(cluster.address):
            wait_for_nodes(2)
            with pytest.raises(EnvironmentProblem) as refused:
                run_study(config)
    message = str(refused.value)
    assert message.startswith(f"the storage {storage} does not serve every node of the cluster:\n")
    assert message.count("  node ") == 1  # the driver's own node is sound
    assert "cannot read what the driver wrote in" in message
    assert "No such file or directory" in message
    assert "put --storage on a file system that every node mounts" in message
    assert not list((storage / "small").glob(f"{TOKEN_NAME}*"))
    assert not (storage / "small" / "study.yaml").exists()
    assert not (storage / "small" / "trials").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_joins_later_without_the_storage_is_named(tmp_path):
    import ray

    if not can_mount(tmp_path):
        pytest.skip("no mount namespaces here")
    folder = tmp_path / "studies" / "small"
    folder.mkdir(parents=True)
    with cluster_of([1]) as cluster, joined(cluster.address):
        with (
            shared_folder(folder, JOINED, None) as token,
            node_elsewhere(cluster.address, folder.parent, tmp_path),
        ):
            wait_for_nodes(2)
            (other,) = (
                n["NodeID"]
                for n in ray.nodes()
                if n["Resources"].get("CPU") == 1.0
                and "node:__internal_head__" not in n["Resources"]
            )
            there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(other, soft=False)
            task = ray.remote(check_token).options(num_cpus=0, scheduling_strategy=there)
            with pytest.raises(
                EnvironmentProblem, match=r"is not shared with node [0-9.]+: cannot"
            ):
                ray.get(task.remote(folder, token))
        assert not list(folder.iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_trials_run_on_both_nodes_of_a_cluster_that_share_the_storage(
    tmp_path, weights_file, monkeypatch
):
    """Workers get the variables they need, and no secret of the driver's."""
    import ray

    secret = "do-not-tell"  # noqa: S105
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    values = study_values(tmp_path, weights_file, trials=6, scheduler={"name": "none"})
    values["trial"]["training"]["epochs"] = 25  # both nodes have time to start
    config = StudyConfig.from_mapping(values)
    with cluster_of([1, 1]) as cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        seen: list[Any] = []

        def look(event: Any) -> None:
            if event.kind == "metrics_recorded":
                from ray.util.state import list_actors, list_jobs

                seen.extend(list_actors(detail=True, filters=[("state", "=", "ALIVE")]))
                seen.extend(list_jobs(detail=True))

        result = run_study(config, observer=look)
    assert {trial.state for trial in result.trials} <= {"COMPLETE", "PRUNED"}
    actors = [entry for entry in seen if hasattr(entry, "class_name")]
    assert len({actor.node_id for actor in actors}) == 2
    told = repr(seen)
    where = told.find(secret)
    assert secret not in told, told[where - 300 : where + 50]
    for name in ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "OMP_NUM_THREADS"):
        assert name in told
    assert not ray.is_initialized()
