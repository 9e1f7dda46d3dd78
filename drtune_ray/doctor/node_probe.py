"""What is asked of every node; an actor of Ray's runs it there."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import drtune_ray
from drtune_ray.errors import first_line

SHARED_MEMORY = Path("/dev/shm")  # nosec B108 # no file of ours lies there
READ_BYTES = 2**16


@dataclass(frozen=True)
class Space:
    """Of a file system, in bytes."""

    free: int
    total: int


@dataclass(frozen=True)
class NodeFacts:
    """What a process of a node sees.

    Attributes:
        versions: By package; Python's too.
        num_gpus: How many CUDA devices computed something.
        gpu_problem: Why another did not; "" where all did or there is none.
        shared_memory: Of the node.
        disk: That Ray writes to.
        unreadable: Why a path that was asked for cannot be read, by path.
    """

    versions: dict[str, str]
    num_gpus: int
    gpu_problem: str
    shared_memory: Space
    disk: Space
    unreadable: dict[str, str]


class NodeProbe:
    """Lives on a node, so that a second question does not wait for the start of a process."""

    def facts(self, paths: tuple[str, ...]) -> NodeFacts:
        """Look around.

        Args:
            paths: Files and folders that should be readable.
        """
        from drtune_ray.execution.ray_state import session_folder

        num_gpus, gpu_problem = usable_gpus()
        unreadable = {path: problem for path in paths if (problem := reading_problem(path))}
        disk = session_folder()
        return NodeFacts(
            own_versions(),
            num_gpus,
            gpu_problem,
            space(SHARED_MEMORY),
            space(disk),
            unreadable,
        )

    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()


def own_versions() -> dict[str, str]:
    """Of what must be the same on all nodes."""
    import ray

    return {
        "Python": platform.python_version(),
        "Ray": ray.__version__,
        "drtune-ray": drtune_ray.__version__,
        # Without the build: +cpu and +cu126 understand each other's files.
        "torch": importlib.metadata.version("torch").partition("+")[0],
    }


def usable_gpus() -> tuple[int, str]:
    """How many CUDA devices compute something, and why another does not."""
    import torch

    num_usable, problem = 0, ""
    for index in range(torch.cuda.device_count()):
        try:
            assert torch.ones(8, device=f"cuda:{index}").sum().item() == 8.0
            num_usable += 1
        except Exception as error:  # CUDA's ways to fail are many
            problem = problem or f"device {index}: {first_line(error)}"
    return num_usable, problem


def space(path: Path) -> Space:
    """Of the file system that holds a path, which need not be there yet."""
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return Space(usage.free, usage.total)


def reading_problem(path: str) -> str:
    """Why a file, or the first file below a folder, cannot be read; "" where it can."""
    try:
        first = path if not os.path.isdir(path) else _first_file(path)
        if first is None:
            return "it holds no file"
        with open(first, "rb") as file:
            file.read(READ_BYTES)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _first_file(folder: str) -> str | None:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders.sort()
        if names:
            return os.path.join(parent, min(names))
    return None
