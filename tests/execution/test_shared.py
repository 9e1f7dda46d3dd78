"""A storage that is another folder on another node is found out before the first trial."""

from __future__ import annotations

import pickle
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from drtune_ray.execution.worker import TrialRunner
from drtune_ray.execution.worker_context import WorkerContext
from drtune_ray.folders import LocalFolder, open_folder
from drtune_ray.study.run import run_study
from tests.clusters import joined, ray_node, wait_for_nodes
from tests.servers import BUCKET, object_store_here
from tests.study.test_study import study_values

pytestmark = pytest.mark.xdist_group("clusters")

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


# ---- two nodes on this machine; the second has file systems of its own over the shared places


@contextmanager
def node_elsewhere(address: str, folders: list[Path], temporary: Path) -> Iterator[None]:
    """A node for which a tmpfs lies over each folder."""
    mounted = " && ".join(f"mount -t tmpfs none {folder}" for folder in folders)
    with ray_node(temporary / "node.log", f"--address={address}", mounted=mounted):
        wait_for_nodes(2)
        yield
    wait_for_nodes(1)


def other_node() -> str:
    """The id of the node that is not the head."""
    import ray

    (found,) = (
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and "node:__internal_head__" not in node["Resources"]
    )
    return str(found)


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_with_another_storage_and_other_artifacts_is_refused(
    shared_ray, tmp_path, weights_file, monkeypatch
):
    """Before the first trial; and one that joins later is named by its first worker."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    storage, mounted = tmp_path / "studies", tmp_path / "artifacts"
    folder, artifacts = storage / "small", LocalFolder(mounted / "small" / "trials")
    storage.mkdir()
    mounted.mkdir()
    if not can_mount(storage):
        pytest.skip("no mount namespaces here")
    monkeypatch.setattr(shared_storage, "ANSWER_SECONDS", 60.0)
    config = StudyConfig.from_mapping(study_values(tmp_path, weights_file))
    with joined(shared_ray.address):
        with shared_folder(folder, JOINED, artifacts) as token:
            assert token is not None
        later = shared_folder(folder, JOINED, None)
        token = later.__enter__()
        with node_elsewhere(shared_ray.address, [storage, mounted], tmp_path):
            there = NodeAffinitySchedulingStrategy(other_node(), soft=False)
            task = ray.remote(check_token).options(num_cpus=0, scheduling_strategy=there)
            named = pytest.raises(
                EnvironmentProblem, match=r"is not shared with node [0-9.]+: cannot"
            )
            with named:
                ray.get(task.remote(folder, token))
            later.__exit__(None, None, None)
            assert not list(folder.iterdir())
            with pytest.raises(EnvironmentProblem) as refused:
                run_study(config)
            with pytest.raises(EnvironmentProblem) as refused_artifacts:
                with shared_folder(folder, JOINED, artifacts):
                    raise AssertionError("a trial would start")
        assert ray.is_initialized()
    message = str(refused.value)
    assert message.startswith(f"the storage {storage} does not serve every node of the cluster:\n")
    assert message.count("  node ") == 1  # the driver's own node is sound
    assert "cannot read what the driver wrote in" in message
    assert "No such file or directory" in message
    assert "put --storage on a file system that every node mounts" in message
    assert not list(folder.glob(f"{TOKEN_NAME}*"))
    assert not (folder / "study.yaml").exists()
    assert not (folder / "trials").exists()
    message = str(refused_artifacts.value)
    assert message.startswith(f"the artifacts {artifacts.path} does not serve every node")
    assert message.count("  node ") == 1
    assert "cannot read what the driver wrote in" in message
    assert message.endswith(ARTIFACTS_FIX)
    assert not list(artifacts.path.iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_answers_too_late_leaves_nothing(shared_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_storage, "ANSWER_SECONDS", 0.0)
    with joined(shared_ray.address):
        with pytest.raises(EnvironmentProblem, match="did not answer in 0 s"):
            with shared_folder(tmp_path / "small", JOINED, None):
                pass
        time.sleep(5)  # by then it would have answered
    assert not list((tmp_path / "small").iterdir())
