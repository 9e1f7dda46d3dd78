"""A storage that is another folder on another node is found out before the first trial."""

from __future__ import annotations

import pickle
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from drtune_ray.config.study import StudyConfig
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution import shared_storage
from drtune_ray.execution.capacity import Capacity, Node
from drtune_ray.execution.shared_storage import (
    ARTIFACTS_FIX,
    TOKEN_NAME,
    SharedPlace,
    _problem,
    answer,
    check_token,
    shared_folder,
)
from drtune_ray.execution.worker import TrialRunner, WorkerContext
from drtune_ray.folders import LocalFolder, open_folder
from drtune_ray.study.run import run_study
from tests.clusters import cluster_of, ray_node
from tests.servers import BUCKET, object_store_here
from tests.study.test_study import study_values

JOINED = Capacity((Node(1, 0), Node(1, 0)))
VERSION = "0.1.0"


def can_mount(folder: Path) -> bool:
    done = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True
    )
    return done.returncode == 0


@pytest.fixture(params=["storage", "file", "s3"])
def place(request, tmp_path) -> SharedPlace:
    """What nodes may share: the storage, or artifacts of either kind."""
    folder = tmp_path / "studies" / "small"
    if request.param == "storage":
        return SharedPlace(folder, None)
    if request.param == "file":
        return SharedPlace(folder, open_folder((tmp_path / "artifacts").as_uri()))
    environment = request.getfixturevalue("s3")
    request.getfixturevalue("monkeypatch").setenv("OPTION", "us-east-1")
    assert environment
    return SharedPlace(folder, open_folder(f"s3://{BUCKET}/{tmp_path.name}?region=$OPTION"))


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with object_store_here() as environment:
        yield environment


def test_answer__reads_and_writes(place):
    place.files.write(TOKEN_NAME, b"token")
    there = pickle.loads(pickle.dumps(place))
    assert answer(there, "token", "answer", VERSION) == ""
    assert place.files.read("answer") == b"token"


def test_answer__says_what_is_wrong(place):
    told = f"cannot read what the driver wrote in {place.address}: "
    assert answer(place, "token", "answer", VERSION).startswith(told)
    place.files.write(TOKEN_NAME, b"of another driver")
    assert "holds something else" in answer(place, "token", "answer", VERSION)
    assert "has drtune-ray 0.1.0, the driver 9.9" in answer(place, "token", "a", "9.9")


def test_answer__cannot_write(tmp_path):
    place = SharedPlace(tmp_path, None)
    place.files.write(TOKEN_NAME, b"token")
    (tmp_path / "no").write_text("a file is in the way")
    assert answer(place, "token", "no/answer", VERSION) == f"cannot write {tmp_path}: File exists"


def test_answer__a_node_without_credentials(s3, tmp_path, monkeypatch):
    place = SharedPlace(tmp_path / "small", open_folder(f"s3://{BUCKET}/x?region=$OPTION"))
    assert "needs the environment variable OPTION" in answer(place, "token", "a", VERSION)
    monkeypatch.setenv("OPTION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    problem = answer(place, "token", "a", VERSION)
    assert problem.startswith(f"cannot read what the driver wrote in s3://{BUCKET}/x/: ")


def test_answer__a_node_that_cannot_keep_its_copies(tmp_path):
    place = SharedPlace(tmp_path / "studies" / "small", LocalFolder(tmp_path / "artifacts"))
    place.files.write(TOKEN_NAME, b"token")
    (tmp_path / "studies").write_text("a file is in the way")
    assert answer(place, "token", "answer", VERSION) == (
        f"cannot write {tmp_path}/studies, where its copies of the tables go: File exists"
    )


def test_check_token__names_the_place(place):
    check_token(place.folder, None, place.artifacts)
    place.files.write(TOKEN_NAME, b"token")
    check_token(place.folder, "token", place.artifacts)
    if isinstance(place.files, LocalFolder):
        assert [path.name for path in place.files.path.iterdir()] == [TOKEN_NAME]
    with pytest.raises(EnvironmentProblem) as caught:
        check_token(place.folder, "another", place.artifacts)
    message = str(caught.value)
    assert re.match(rf"the {re.escape(str(place))} is not shared with node \S+: ", message)
    assert message.endswith(place.fix)


def test_workshop__looks_into_the_artifacts_of_the_trials(place):
    place.files.write(TOKEN_NAME, b"of another driver")
    context = WorkerContext(
        {},
        place.folder / "trials",
        1,
        "cpu",
        place.artifacts,
        token="token",
        study_id="small-1",
        hang_seconds=60,
    )
    with pytest.raises(EnvironmentProblem, match=f"^the {place} is not shared with node"):
        TrialRunner(context)


def test_shared_folder__one_machine_is_not_asked(tmp_path):
    with shared_folder(tmp_path, Capacity((Node(1, 0),), is_local=True), None) as token:
        assert token is None
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (RuntimeError(), "cannot run drtune-ray: RuntimeError"),
        (RuntimeError("Traceback ...\n  No module named x\n"), "cannot run drtune-ray: No module"),
    ],
)
def test_problem__whatever_ray_raises(error, problem, tmp_path, monkeypatch):
    import ray

    def fail(ref, timeout):
        raise error

    monkeypatch.setattr(ray, "get", fail)
    place = SharedPlace(tmp_path, None)
    assert _problem(place, "token", "node", None).startswith(problem)


# ---- two nodes on this machine; the second has a file system of its own over the storage


@contextmanager
def node_elsewhere(address: str, storage: Path, temporary: Path) -> Iterator[None]:
    """A node for which a tmpfs lies over the storage."""
    mounted = f"mount -t tmpfs none {storage}"
    with ray_node(temporary / "node.log", f"--address={address}", mounted=mounted):
        yield


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
def test_artifacts_that_one_node_does_not_reach_are_refused_before_the_first_trial(
    tmp_path, monkeypatch
):
    import ray

    mounted, folder = tmp_path / "artifacts", tmp_path / "studies" / "small"
    mounted.mkdir()
    if not can_mount(mounted):
        pytest.skip("no mount namespaces here")
    monkeypatch.setattr(shared_storage, "ANSWER_SECONDS", 60.0)
    artifacts = LocalFolder(mounted / "small" / "trials")
    with cluster_of([1]) as cluster, joined(cluster.address):
        with shared_folder(folder, JOINED, artifacts) as token:
            assert token is not None
        with node_elsewhere(cluster.address, mounted, tmp_path):
            wait_for_nodes(2)
            with pytest.raises(EnvironmentProblem) as refused:
                with shared_folder(folder, JOINED, artifacts):
                    raise AssertionError("a trial would start")
        assert ray.is_initialized()
    message = str(refused.value)
    assert message.startswith(f"the artifacts {artifacts.path} does not serve every node")
    assert message.count("  node ") == 1
    assert "cannot read what the driver wrote in" in message
    assert message.endswith(ARTIFACTS_FIX)
    assert not list(artifacts.path.iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_answers_too_late_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_storage, "ANSWER_SECONDS", 0.0)
    with cluster_of([1]) as cluster, joined(cluster.address):
        with pytest.raises(EnvironmentProblem, match="did not answer in 0 s"):
            with shared_folder(tmp_path / "small", JOINED, None):
                pass
        time.sleep(5)  # by then it would have answered
    assert not list((tmp_path / "small").iterdir())


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
