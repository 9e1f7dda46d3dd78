"""Check the nodes of a cluster: equal versions and clocks, GPUs, memory, disk and files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drtune_ray.doctor.clock_skew import FIX as CLOCK_FIX
from drtune_ray.doctor.clock_skew import Skew, measured_skew
from drtune_ray.doctor.findings import Doubt
from drtune_ray.doctor.node_probe import NodeFacts, NodeProbe, Space, own_versions
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution import shared_storage

MIN_DISK_BYTES = 2**30
MIN_SHARED_MEMORY_BYTES = 2**28
# Below this free share of the disk Ray stores no objects (its local_fs_capacity_threshold).
RAY_DISK_SHARE = 0.05
ANSWER_SECONDS = 30.0  # for a process that is running


@dataclass(frozen=True)
class NodeReport:
    """Report on a node.

    Attributes:
        name: Name of the node, for messages.
        num_gpus: Number of GPUs that Ray counts.
        facts: Facts that a process found there.
        skew: Difference of its clock from this machine's.
    """

    name: str
    num_gpus: int
    facts: NodeFacts
    skew: Skew


class Nodes:
    """Reports on the living nodes of the cluster that this process has joined."""

    def __init__(self) -> None:
        self.reports: list[NodeReport] = []

    def probe(self, paths: Sequence[str]) -> str:
        """Run a process on each node and collect its report.

        Args:
            paths: Files and folders that each node tries to read.

        Raises:
            EnvironmentProblem: If a node does not respond; the other nodes are still reported.
        """
        import ray

        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        probes = {key: _probe_on(key) for key in alive}
        facts = {key: probe.facts.remote(tuple(paths)) for key, probe in probes.items()}
        ray.wait(
            list(facts.values()), num_returns=len(facts), timeout=shared_storage.ANSWER_SECONDS
        )
        problems = []
        for key, ref in facts.items():
            name = f"node {alive[key]['NodeManagerAddress']} ({key[:8]})"
            try:
                self.reports.append(_report(name, alive[key], probes[key], ray.get(ref, timeout=0)))
            except Exception as error:
                problems.append(f"{name}: {shared_storage.ray_error_text(error)}")
            ray.kill(probes[key])
        if problems:
            raise EnvironmentProblem(
                f"{'; '.join(problems)}; install the same versions of drtune-ray, Python and Ray "
                "on every node"
            )
        return f"drtune-ray ran on {len(alive)}"

    def check_versions(self) -> str:
        """Check that all nodes have the versions of this machine.

        Raises:
            EnvironmentProblem: If a node has others, naming each.
        """
        own = own_versions()
        _raise_for(
            self._problems(lambda node: _differences(node.facts.versions, own)),
            "install the same versions on every node, preferably from one image",
        )
        return ", ".join(f"{name} {version}" for name, version in own.items())

    def check_gpus(self) -> str:
        """Check that torch can use the GPUs that Ray assigns.

        Raises:
            Doubt: If torch can use more GPUs than Ray counts.
            EnvironmentProblem: If torch can use fewer, naming the nodes.
        """
        _raise_for(
            self._problems(_gpu_problem),
            "install a torch build for the CUDA version of the node's driver, or start Ray there "
            "with the correct --num-gpus",
        )
        idle = self._problems(_idle_gpus)
        if idle:
            raise Doubt(f"{'; '.join(idle)}; start Ray there with --num-gpus to use all of them")
        number = sum(node.num_gpus for node in self.reports)
        return f"{number}, usable by torch" if number else "none"

    def check_clocks(self) -> str:
        """Check that the clocks agree with this machine's.

        Raises:
            EnvironmentProblem: If a clock differs too much, naming the nodes.
        """
        _raise_for(
            self._problems(lambda n: f"its clock is {n.skew}" if n.skew.is_too_large else ""),
            CLOCK_FIX,
        )
        largest = max((abs(node.skew.seconds) for node in self.reports), default=0.0)
        return f"at most {largest:.1f} s apart"

    def check_shared_memory(self) -> str:
        """Check that data loaders and Ray's object store have enough shared memory.

        Raises:
            EnvironmentProblem: If a node has too little, naming each.
        """
        _raise_for(
            self._problems(lambda node: _lack(node.facts.shared_memory, MIN_SHARED_MEMORY_BYTES)),
            "give the container more: --shm-size in docker, an emptyDir of medium Memory at "
            "/dev/shm in Kubernetes",
        )
        return f"at least {_least(node.facts.shared_memory for node in self.reports)} free"

    def check_disks(self) -> str:
        """Check that Ray has disk space.

        Raises:
            EnvironmentProblem: If a disk is full, naming the nodes.
        """
        _raise_for(
            self._problems(lambda node: _ray_disk_problem(node.facts.disk)),
            "free space where Ray keeps its sessions (/tmp/ray), or start Ray with another "
            "--temp-dir",
        )
        return f"at least {_least(node.facts.disk for node in self.reports)} free"

    def check_readable(self, path: str) -> str:
        """Check that every node can read a file or folder; training itself does not need it.

        Raises:
            Doubt: If a node cannot, naming each.
        """
        problems = self._problems(
            lambda node: (
                f"cannot read {path} ({node.facts.unreadable[path]})"
                if path in node.facts.unreadable
                else ""
            )
        )
        if problems:
            raise Doubt(
                f"{'; '.join(problems)}; workers read prepared tables instead, but a command that "
                "Ray starts there (`ray job submit`) needs it: mount it at the same path"
            )
        return f"{path} is readable on all {len(self.reports)}"

    def _problems(self, look: Callable[[NodeReport], str]) -> list[str]:
        found = ((node.name, look(node)) for node in self.reports)
        return [f"{name}: {problem}" for name, problem in found if problem]


def size_text(num_bytes: int) -> str:
    """Format a size in GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _probe_on(node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=there).remote()


def _report(name: str, node: Mapping[str, Any], probe: Any, facts: NodeFacts) -> NodeReport:
    import ray

    def read() -> float:
        seconds: float = ray.get(probe.clock.remote(), timeout=ANSWER_SECONDS)
        return seconds

    num_gpus = math.ceil(node["Resources"].get("GPU", 0.0))
    return NodeReport(name, num_gpus, facts, measured_skew(read, time.time))


def _raise_for(problems: Sequence[str], fix: str) -> None:
    if problems:
        raise EnvironmentProblem(f"{'; '.join(problems)}; {fix}")


def _differences(versions: Mapping[str, str], own: Mapping[str, str]) -> str:
    found = [
        f"{name} {versions[name]}, here {own[name]}" for name in own if versions[name] != own[name]
    ]
    return f"has {', '.join(found)}" if found else ""


def _gpu_problem(node: NodeReport) -> str:
    if node.facts.num_gpus >= node.num_gpus and not node.facts.gpu_problem:
        return ""
    why = f" ({node.facts.gpu_problem})" if node.facts.gpu_problem else ""
    return f"Ray counts {node.num_gpus} GPUs, torch can use {node.facts.num_gpus}{why}"


def _idle_gpus(node: NodeReport) -> str:
    if node.facts.num_gpus <= node.num_gpus:
        return ""
    return f"torch can use {node.facts.num_gpus} GPUs, Ray counts {node.num_gpus}"


def _lack(space: Space, needed: int) -> str:
    if space.free >= needed:
        return ""
    return f"{size_text(space.free)} free, but at least {size_text(needed)} needed"


def _ray_disk_problem(space: Space) -> str:
    return _lack(space, max(MIN_DISK_BYTES, int(RAY_DISK_SHARE * space.total)))


def _least(spaces: Any) -> str:
    return size_text(min((space.free for space in spaces), default=0))
