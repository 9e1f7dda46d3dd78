"""The proof, before the first trial, that all nodes see the same storage.

The driver writes a token to the study's folder, or to the artifacts of its trials. A task on each
node must read it there and write it back; a node that joins later is checked when its first worker
starts.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drtune_ray
from drtune_ray.errors import EnvironmentProblem, first_line
from drtune_ray.execution.capacity import Capacity
from drtune_ray.folders import Folder, LocalFolder, as_problem

TOKEN_NAME = ".shared-token"  # nosec B105 # the name of a file
ANSWER_SECONDS = 180.0  # a node may have to start a process and to import torch first
FIX = (
    "put --storage on a file system that every node mounts at the same path (NFS, Lustre, EFS, "
    "a ReadWriteMany volume), and drtune-ray of the same version on every node"
)
ARTIFACTS_FIX = (
    "mount a file:// folder at the same path on every node, give the environment in which Ray "
    "starts there the credentials of an object store, and have drtune-ray of the same version on "
    "every node"
)


@dataclass(frozen=True)
class SharedPlace:
    """The storage that every node must reach.

    Attributes:
        folder: Folder of the study.
        artifacts: Artifacts of the study's trials, shared instead of `folder`; None without them.
    """

    folder: Path
    artifacts: Folder | None

    @property
    def files(self) -> Folder:
        """Folder of the token and the answers."""
        return self.artifacts or LocalFolder(self.folder)

    @property
    def address(self) -> str:
        """Address of the files, for messages."""
        return self.files.address("")

    @property
    def fix(self) -> str:
        """What to do if a node does not reach it."""
        return ARTIFACTS_FIX if self.artifacts else FIX

    def __str__(self) -> str:
        return f"artifacts {self.address}" if self.artifacts else f"storage {self.folder.parent}"


@contextmanager
def shared_folder(
    folder: Path, capacity: Capacity | None, artifacts: Folder | None
) -> Iterator[str | None]:
    """Prove that all nodes share the storage; yield the token that later nodes must find.

    Args:
        folder: Folder of the study.
        capacity: Capacity of the cluster; None if nothing will run.
        artifacts: Artifacts of the study's trials; None without them.

    Raises:
        EnvironmentProblem: Naming the nodes that do not share it, each with the reason.
    """
    if capacity is None or capacity.is_local:
        yield None
        return
    with shared_token(SharedPlace(folder, artifacts)) as token:
        yield token


@contextmanager
def shared_token(place: SharedPlace) -> Iterator[str]:
    """Write a token that every node must find; return it.

    Raises:
        EnvironmentProblem: Naming the nodes that did not find it, each with the reason.
    """
    token = secrets.token_hex(16)
    with as_problem(place.address) if place.artifacts else nullcontext():
        place.files.write(TOKEN_NAME, token.encode())
    try:
        if problems := _ask_nodes(place, token):
            raise EnvironmentProblem(
                f"the {place} does not serve every node of the cluster:\n"
                + "".join(f"  {problem}\n" for problem in problems)
                + place.fix
            )
        yield token
    finally:
        _remove(place, TOKEN_NAME)


def check_token(folder: Path, token: str | None, artifacts: Folder | None = None) -> None:
    """Refuse to work on a node that has another folder of this name, or other artifacts.

    Args:
        folder: Folder of the study.
        token: The driver's token; None if nothing is shared.
        artifacts: Artifacts of the study's trials; None without them.

    Raises:
        EnvironmentProblem: Naming the node.
    """
    if token is None:
        return
    place, name = SharedPlace(folder, artifacts), _answer_name(uuid.uuid4().hex)
    problem = answer(place, token, name, drtune_ray.__version__)
    _remove(place, name)
    if problem:
        from ray.util import get_node_ip_address

        raise EnvironmentProblem(
            f"the {place} is not shared with node {get_node_ip_address()}: {problem}; {place.fix}"
        )


def answer(place: SharedPlace, token: str, name: str, version: str) -> str:
    """Read the token on a node and write it back under a name; return the problem, or ""."""
    if drtune_ray.__version__ != version:
        return f"has drtune-ray {drtune_ray.__version__}, the driver {version}"
    try:
        found = place.files.read(TOKEN_NAME)
    except (OSError, ValueError) as error:
        return f"cannot read what the driver wrote in {place.address}: {_reason(error)}"
    if found != token.encode():
        return f"{place.address} holds something else than the driver wrote there"
    try:
        place.files.write(name, token.encode())
    except (OSError, ValueError) as error:
        return f"cannot write {place.address}: {_reason(error)}"
    return _disk_problem(place.folder.parent, name) if place.artifacts else ""


def _disk_problem(storage: Path, name: str) -> str:
    """Return why this node cannot keep its own copies, where nodes share artifacts only."""
    try:
        LocalFolder(storage).write(name)
        LocalFolder(storage).remove(name)
    except OSError as error:
        return f"cannot write {storage}, where its copies of the tables go: {_reason(error)}"
    return ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def _ask_nodes(place: SharedPlace, token: str) -> list[str]:
    """Return a line for each node that has a problem."""
    import ray

    asked = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    answers = {key: _ask(place, token, key) for key in asked}
    _, late = ray.wait(list(answers.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    problems = {key: _problem(place, token, key, ref) for key, ref in answers.items()}
    for ref in late:  # or it would leave its answer when nobody removes it
        ray.cancel(ref, force=True)
    for key in asked:
        _remove(place, _answer_name(key))
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [
        f"node {asked[key]} ({key[:8]}): {problem}"
        for key, problem in problems.items()
        if problem and key in alive  # one that died meanwhile runs no trial
    ]


def _ask(place: SharedPlace, token: str, node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(answer).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    return task.remote(place, token, _answer_name(node), drtune_ray.__version__)


def _problem(place: SharedPlace, token: str, node: str, ref: Any) -> str:
    import ray

    try:
        problem: str = ray.get(ref, timeout=0)
    except Exception as error:
        return ray_error_text(error)
    if problem:
        return problem
    try:
        is_here = place.files.read(_answer_name(node)) == token.encode()
    except (OSError, ValueError):
        is_here = False
    return "" if is_here else f"what it wrote in {place.address} does not reach the driver"


def ray_error_text(error: Exception) -> str:
    """Return why a node did not answer, for example because drtune-ray is missing there."""
    import ray

    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"did not answer in {ANSWER_SECONDS:g} s"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"cannot run drtune-ray: {lines[-1].strip()}"


def _remove(place: SharedPlace, name: str) -> None:
    """Remove a file if possible; the next run overwrites it."""
    with suppress(OSError, ValueError):
        place.files.remove(name)


def _answer_name(node: str) -> str:
    return f"{TOKEN_NAME}-{node}"
