"""Fixtures of the tests that need Ray: one cluster for each process that runs tests.

A test that only needs some Ray takes `shared_ray`: its studies and trainings join that cluster
instead of starting one. A test whose subject is the start or the end of Ray, a node or a setting
of the cluster starts its own.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from _pytest.nodeid import coerce_node_id

from tests import leftovers
from tests.clusters import address_set, joined, start_cluster, token_auth

NODE_PATH = "/path/of/the/node"  # PYTHONPATH where the cluster was started
NUM_CPUS = 2


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    """Give each test the id by which pytest-xdist knows its group.

    pytest-xdist 3.8 writes it to an attribute that pytest 9.2 does not read: without this,
    ``--dist loadgroup`` divides the tests as if none had a group.
    """
    yield
    for item in items:
        wanted = vars(item).get("_nodeid")
        if wanted is not None and wanted != item.nodeid:
            item._id = coerce_node_id(wanted)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A cluster of one node with two CPUs and a dashboard; at the end nothing may hold them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - {"RAY_worker_niceness"}:
            if name.startswith(("RAY_", "SABOTAGE", "AWS_", "MLFLOW_", "OMP_")):
                patch.delenv(name)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", NODE_PATH)
        with token_auth():
            cluster = start_cluster(
                num_cpus=NUM_CPUS, include_dashboard=True, dashboard_port=leftovers.free_port()
            )
    try:
        yield cluster
        with token_auth(), joined(cluster.address):
            leftovers.assert_cluster_is_empty()
    finally:
        cluster.shutdown()


@pytest.fixture
def shared_ray(ray_cluster: Any) -> Iterator[Any]:
    """The cluster of this process, which studies join by ``RAY_ADDRESS``."""
    with address_set(ray_cluster):
        yield ray_cluster
