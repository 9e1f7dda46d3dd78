"""A storage that is not the same folder on every node is found out before the first trial.

The driver leaves a token in the study's folder. A task on each node must read it there and write
it back; a node that joins later is asked when its first worker starts.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drtune_ray
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.search.nodes import Capacity

TOKEN_NAME = ".shared-token"
ANSWER_SECONDS = 180.0  # a node may have to start a process and to import torch first
FIX = (
    "put --storage on a file system that every node mounts at the same path (NFS, Lustre, EFS, "
    "a ReadWriteMany volume), and drtune-ray of the same version on every node"
)


@dataclass(frozen=True)
class Cluster:
    """Where trials run.

    Attributes:
        capacity: What it holds.
        token: What its nodes must find in the storage; None: nothing needs to be shared.
        on_notice: Takes a line for the user.
    """

    capacity: Capacity
    token: str | None
    on_notice: Callable[[str], None]


def needs_shared_storage(capacity: Capacity, artifacts: str | None) -> bool:
    """Whether a node may run trials that has neither this machine's disks nor `artifacts`."""
    return not capacity.is_local and artifacts is None


@contextmanager
def shared_folder(
    folder: Path, capacity: Capacity | None, artifacts: str | None
) -> Iterator[str | None]:
    """Prove that all nodes share a folder; yields the token that later nodes are asked for.

    Args:
        folder: The study's.
        capacity: The cluster; None: nothing will run.
        artifacts: Where the nodes find everything instead, if they do.

    Raises:
        EnvironmentProblem: Naming the nodes that do not, each with its reason.
    """
    if capacity is None or not needs_shared_storage(capacity, artifacts):
        yield None
        return
    token = secrets.token_hex(16)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / TOKEN_NAME
    file.write_text(token)
    try:
        if problems := _ask_nodes(folder, token):
            raise EnvironmentProblem(
                f"the storage {folder.parent} does not serve every node of the cluster:\n"
                + "".join(f"  {problem}\n" for problem in problems)
                + FIX
            )
        yield token
    finally:
        file.unlink(missing_ok=True)


def check_token(folder: Path, token: str | None) -> None:
    """Refuse to work on a node that has another folder of this name.

    Raises:
        EnvironmentProblem: Naming the node.
    """
    if token is None:
        return
    if problem := _difference(folder, token):
        from ray.util import get_node_ip_address

        raise EnvironmentProblem(
            f"the storage {folder.parent} is not shared with node {get_node_ip_address()}: "
            f"{problem}; {FIX}"
        )


def answer(folder: str, token: str, name: str, version: str) -> str:
    """Runs on a node: read the token, write it back under a name; returns the problem, or ""."""
    if drtune_ray.__version__ != version:
        return f"has drtune-ray {drtune_ray.__version__}, the driver {version}"
    problem = _difference(Path(folder), token)
    if not problem:
        try:
            (Path(folder) / name).write_text(token)
        except OSError as error:
            problem = f"cannot write {folder}: {error.strerror}"
    return problem


def _difference(folder: Path, token: str) -> str:
    try:
        found = (folder / TOKEN_NAME).read_text()
    except OSError as error:
        return f"cannot read what the driver wrote in {folder}: {error.strerror}"
    return "" if found == token else f"{folder} holds something else than the driver wrote there"


def _ask_nodes(folder: Path, token: str) -> list[str]:
    """What is wrong, a line a node."""
    import ray

    asked = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    answers = {key: _ask(folder, token, key) for key in asked}
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=ANSWER_SECONDS)
    problems = {key: _problem(folder, token, key, ref) for key, ref in answers.items()}
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [
        f"node {asked[key]} ({key[:8]}): {problem}"
        for key, problem in problems.items()
        if problem and key in alive  # one that died meanwhile runs no trial
    ]


def _ask(folder: Path, token: str, node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(answer).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    return task.remote(str(folder), token, _answer_name(node), drtune_ray.__version__)


def _problem(folder: Path, token: str, node: str, ref: Any) -> str:
    import ray

    file = folder / _answer_name(node)
    try:
        problem: str = ray.get(ref, timeout=0)
        if not problem and (not file.exists() or file.read_text() != token):
            problem = f"what it wrote in {folder} does not reach the driver"
        return problem
    except ray.exceptions.GetTimeoutError:
        return f"did not answer in {ANSWER_SECONDS:g} s"
    except Exception as error:  # whatever happened there, drtune-ray missing above all
        return f"cannot run drtune-ray: {str(error).strip().splitlines()[-1]}"
    finally:
        file.unlink(missing_ok=True)


def _answer_name(node: str) -> str:
    return f"{TOKEN_NAME}-{node}"
