"""Ray clusters on this machine, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

RAY = Path(sys.executable).with_name("ray")
# Ray has time limits of its own for its start, which a busy machine may exceed.
START_ATTEMPTS = 3


def started(start: Callable[[], Any]) -> Any:
    """Return what a start of Ray returns, after up to `START_ATTEMPTS` attempts."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            return start()
        except Exception as error:
            if attempt == START_ATTEMPTS:
                raise
            print(f"Ray did not start (attempt {attempt} of {START_ATTEMPTS}): {error!r}")
    raise AssertionError("unreachable")


def start_cluster(**head: Any) -> Any:
    """Start the head of a cluster; its arguments are those of `Cluster.add_node`."""
    from ray.cluster_utils import Cluster

    return started(lambda: Cluster(initialize_head=True, head_node_args=head))


@contextmanager
def token_auth() -> Iterator[None]:
    """Have Ray ask for the token of this user within a block, as a local ``ray.init()`` does.

    That sets the mode for the rest of the process, and a process cannot go back (Ray 2.60): a
    cluster that was started without a token would take this process for dead from then on.
    """
    from ray._private.authentication import authentication_token_setup as setup

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        setup._enable_token_auth()  # Ray has read the mode already when it was imported
        setup.ensure_token_if_auth_enabled(None, create_token_if_missing=True)
        yield


@contextmanager
def cluster_of(cpus: Sequence[int]) -> Iterator[Any]:
    """A cluster with a node for each number of CPUs, the first is the head."""
    with token_auth():
        cluster = start_cluster(num_cpus=cpus[0])
        try:
            for number in cpus[1:]:
                cluster.add_node(num_cpus=number)
            yield cluster
        finally:
            cluster.shutdown()


@contextmanager
def address_set(cluster: Any) -> Iterator[Any]:
    """Within, a study that this process runs joins the cluster."""
    with token_auth(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Within, this process is a driver of the cluster."""
    import ray

    started(lambda: ray.init(address, log_to_driver=False, logging_level="ERROR"))
    try:
        yield
    finally:
        ray.shutdown()


def wait_for_nodes(number: int, seconds: float = 60.0) -> None:
    """Wait until the joined cluster has exactly so many living nodes."""
    import ray

    deadline = time.monotonic() + seconds
    while (found := sum(node["Alive"] for node in ray.nodes())) != number:
        assert time.monotonic() < deadline, f"{found} nodes live, not {number}"
        time.sleep(0.1)


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
        options: Options of the command.
        mounted: A command that mounts file systems for it.
        environment: Variables of its processes; None: those of this process.
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
