from __future__ import annotations

import pytest

from drtune_ray.doctor.check_nodes import NodeReport, Nodes
from drtune_ray.doctor.clock_skew import Skew
from drtune_ray.doctor.findings import Doubt
from drtune_ray.doctor.node_probe import NodeFacts, Space
from drtune_ray.errors import EnvironmentProblem

ROOM = Space(2**40, 2**41)


def nodes(counted: int, usable: int, problem: str = "") -> Nodes:
    """A node with so many GPUs by Ray and by torch, and one that has two of each."""
    found = Nodes()
    for name, number, can, why in (("a", 2, 2, ""), ("b", counted, usable, problem)):
        facts = NodeFacts({}, can, why, ROOM, ROOM, {})
        found.reports.append(NodeReport(f"node {name}", number, facts, Skew(0.0, 0.0)))
    return found


def test_check_gpus() -> None:
    assert nodes(4, 4).check_gpus() == "6, usable by torch"
    with pytest.raises(Doubt) as doubt:
        nodes(1, 4).check_gpus()
    assert str(doubt.value) == (
        "node b: torch can use 4 GPUs, Ray counts 1; start Ray there with --num-gpus to use all of "
        "them"
    )


def test_check_gpus__a_device_that_fails() -> None:
    with pytest.raises(EnvironmentProblem, match="^node b: Ray counts 4 GPUs, torch can use 3 "):
        nodes(4, 3, "device 3: CUDA error: out of memory").check_gpus()
    # One that Ray does not assign is reported too: something is wrong with the machine.
    with pytest.raises(EnvironmentProblem, match=r"\(device 3: uncorrectable ECC error\)"):
        nodes(3, 3, "device 3: uncorrectable ECC error").check_gpus()
