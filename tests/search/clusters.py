"""Ray clusters of several nodes on this machine, for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def cluster_of(cpus: Sequence[int]) -> Iterator[Any]:
    """A cluster with a node for each number of CPUs, the first is the head."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0]})
    try:
        for number in cpus[1:]:
            cluster.add_node(num_cpus=number)
        yield cluster
    finally:
        cluster.shutdown()
