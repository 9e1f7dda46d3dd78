"""Ray clusters of several nodes on this machine, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RAY = Path(sys.executable).with_name("ray")


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


@contextmanager
def ray_node(
    log: Path,
    *options: str,
    mounted: str = "true",
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """``ray start``, in a session and a mount namespace of its own.

    Args:
        log: What it prints.
        options: Of the command.
        mounted: A command that mounts file systems for it.
        environment: Of its processes; None: as this one's.
    """
    start = [str(RAY), "start", "--num-cpus=1", "--object-store-memory=100000000", "--block"]
    script = f"{mounted} && exec {' '.join([*start, *options])}"
    with log.open("w") as sink:
        node = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", script],
            stdout=sink,
            stderr=sink,
            env=dict(os.environ if environment is None else environment),
            start_new_session=True,
        )
    try:
        yield node
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        try:
            node.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
