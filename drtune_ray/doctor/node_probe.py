"""Collect the facts of a node; a Ray actor runs this there."""

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
    """Free and total space of a file system, in bytes."""

    free: int
    total: int


@dataclass(frozen=True)
class NodeFacts:
    """Facts of a node, as a process there sees them.

    Attributes:
        versions: Version by package, Python included.
        num_gpus: Number of CUDA devices that work.
        gpu_problem: Error of a device that does not work; "" if there is none.
        shared_memory: Space of /dev/shm.
        disk: Space of the disk that Ray writes to.
        unreadable: Reasons why paths cannot be read, by path.
    """

    versions: dict[str, str]
    num_gpus: int
    gpu_problem: str
    shared_memory: Space
    disk: Space
    unreadable: dict[str, str]


class NodeProbe:
    """Actor on a node, which answers several requests without starting another process."""

    def facts(self, paths: tuple[str, ...]) -> NodeFacts:
        """Collect the facts of this node.

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
        """Return the time of this node in seconds since 1970."""
        return time.time()


def own_versions() -> dict[str, str]:
    """Return the versions that must be the same on all nodes."""
    import ray

    return {
        "Python": platform.python_version(),
        "Ray": ray.__version__,
        "drtune-ray": drtune_ray.__version__,
        # Without the build: the files of +cpu and +cu126 are compatible.
        "torch": importlib.metadata.version("torch").partition("+")[0],
    }


def usable_gpus() -> tuple[int, str]:
    """Return the number of CUDA devices that work, and the error of one that does not."""
    import torch

    num_usable, problem = 0, ""
    for index in range(torch.cuda.device_count()):
        try:
            assert torch.ones(8, device=f"cuda:{index}").sum().item() == 8.0
            num_usable += 1
        except Exception as error:  # CUDA errors have many types
            problem = problem or f"device {index}: {first_line(error)}"
    return num_usable, problem


def space(path: Path) -> Space:
    """Return the space of the file system of a path, which need not exist yet."""
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return Space(usage.free, usage.total)


def reading_problem(path: str) -> str:
    """Return why a file, or the first file below a folder, cannot be read; "" if it can."""
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
