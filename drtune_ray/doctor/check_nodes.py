"""What every node must have in common, and each must have enough of."""

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
# Ray puts no object where less of the disk is free (its local_fs_capacity_threshold).
RAY_DISK_SHARE = 0.05
ANSWER_SECONDS = 30.0  # of a process that runs


@dataclass(frozen=True)
class NodeReport:
    """What is known of a node.

    Attributes:
        name: For people.
        num_gpus: That Ray counts.
        facts: What a process saw there.
        skew: Of its clock.
    """

    name: str
    num_gpus: int
    facts: NodeFacts
    skew: Skew


class Nodes:
    """The living nodes of the cluster that this process has joined, and what they answered."""

    def __init__(self) -> None:
        self.reports: list[NodeReport] = []

    def ask(self, paths: Sequence[str]) -> str:
        """Run a process on each.

        Args:
            paths: Files and folders that it tries to read.

        Raises:
            EnvironmentProblem: Naming the nodes that did not answer; the others did.
        """
        import ray

        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        probes = {key: _probe_on(key) for key in alive}
        asked = {key: probe.facts.remote(tuple(paths)) for key, probe in probes.items()}
        ray.wait(
            list(asked.values()), num_returns=len(asked), timeout=shared_storage.ANSWER_SECONDS
        )
        problems = []
        for key, ref in asked.items():
            name = f"node {alive[key]['NodeManagerAddress']} ({key[:8]})"
            try:
                self.reports.append(_report(name, alive[key], probes[key], ray.get(ref, timeout=0)))
            except Exception as error:
                problems.append(f"{name}: {shared_storage.ray_error_text(error)}")
            ray.kill(probes[key])
        if problems:
            raise EnvironmentProblem(
                f"{'; '.join(problems)}; have drtune-ray, Python and Ray of the same versions on "
                "every node"
            )
        return f"{len(alive)} ran drtune-ray"

    def check_versions(self) -> str:
        """Whether all have those of this machine.

        Raises:
            EnvironmentProblem: Naming the nodes that do not.
        """
        own = own_versions()
        _raise_for(
            self._problems(lambda node: _differences(node.facts.versions, own)),
            "install the same versions on every node, best from one image",
        )
        return ", ".join(f"{name} {version}" for name, version in own.items())

    def check_gpus(self) -> str:
        """Whether torch can use the GPUs that Ray gives away.

        Raises:
            Doubt: If torch can use more than Ray knows of.
            EnvironmentProblem: Naming the nodes where it cannot.
        """
        _raise_for(
            self._problems(_gpu_problem),
            "install a torch for the CUDA of the node's driver, or start Ray there with the "
            "--num-gpus that there are",
        )
        idle = self._problems(_idle_gpus)
        if idle:
            raise Doubt(f"{'; '.join(idle)}; start Ray there with --num-gpus for it to use them")
        number = sum(node.num_gpus for node in self.reports)
        return f"{number}, usable by torch" if number else "none"

    def check_clocks(self) -> str:
        """Whether they go with this machine's.

        Raises:
            EnvironmentProblem: Naming those that do not.
        """
        _raise_for(
            self._problems(lambda n: f"its clock is {n.skew}" if n.skew.is_too_large else ""),
            CLOCK_FIX,
        )
        largest = max((abs(node.skew.seconds) for node in self.reports), default=0.0)
        return f"at most {largest:.1f} s apart"

    def check_shared_memory(self) -> str:
        """Whether data loaders and Ray's object store have room.

        Raises:
            EnvironmentProblem: Naming the nodes that have none.
        """
        _raise_for(
            self._problems(lambda node: _lack(node.facts.shared_memory, MIN_SHARED_MEMORY_BYTES)),
            "give the container more: --shm-size of docker, an emptyDir of medium Memory at "
            "/dev/shm in Kubernetes",
        )
        return f"at least {_least(node.facts.shared_memory for node in self.reports)} free"

    def check_disks(self) -> str:
        """Whether Ray can write on.

        Raises:
            EnvironmentProblem: Naming the nodes whose disk is full.
        """
        _raise_for(
            self._problems(lambda node: _ray_disk_problem(node.facts.disk)),
            "free space where Ray keeps its sessions (/tmp/ray), or start it with another "
            "--temp-dir",
        )
        return f"at least {_least(node.facts.disk for node in self.reports)} free"

    def check_readable(self, path: str) -> str:
        """Whether their processes can read a file or folder; they train without it.

        Raises:
            Doubt: Naming the nodes that cannot.
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
                f"{'; '.join(problems)}; workers get prepared tables and do without, but a command "
                "that Ray starts there (`ray job submit`) needs it: mount it at the same path"
            )
        return f"{path} can be read on all {len(self.reports)}"

    def _problems(self, look: Callable[[NodeReport], str]) -> list[str]:
        found = ((node.name, look(node)) for node in self.reports)
        return [f"{name}: {problem}" for name, problem in found if problem]


def size_text(num_bytes: int) -> str:
    """In GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _probe_on(node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=there).remote()


def _report(name: str, node: Mapping[str, Any], probe: Any, facts: NodeFacts) -> NodeReport:
    import ray

    def ask() -> float:
        answer: float = ray.get(probe.clock.remote(), timeout=ANSWER_SECONDS)
        return answer

    num_gpus = math.ceil(node["Resources"].get("GPU", 0.0))
    return NodeReport(name, num_gpus, facts, measured_skew(ask, time.time))


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
    return f"of GPUs Ray counts {node.num_gpus}, torch can use {node.facts.num_gpus}{why}"


def _idle_gpus(node: NodeReport) -> str:
    if node.facts.num_gpus <= node.num_gpus:
        return ""
    return f"of GPUs torch can use {node.facts.num_gpus}, Ray counts {node.num_gpus}"


def _lack(space: Space, needed: int) -> str:
    if space.free >= needed:
        return ""
    return f"{size_text(space.free)} free, at least {size_text(needed)} must be"


def _ray_disk_problem(space: Space) -> str:
    return _lack(space, max(MIN_DISK_BYTES, int(RAY_DISK_SHARE * space.total)))


def _least(spaces: Any) -> str:
    return size_text(min((space.free for space in spaces), default=0))
