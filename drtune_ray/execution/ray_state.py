"""TODO docstring."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray import ActorID
from ray.core.generated import gcs_pb2
from ray.experimental import internal_kv
from ray.util import placement_group_table

from drtune_ray.execution.capacity import TRIAL_DRIVER, Capacity, Demand, Node, NodeGroup, _count

NAMESPACE = "drtune-ray"
WORKER_CLASS = "RayTrainWorker"
BY_DRIVER = (b"", ActorID.nil().binary())  # the creator of what a driver itself asked for
# Ray Train's class, and how long it may take to end one.
CONTROLLER_CLASS = "TrainController"


def _read(key: str) -> str | None:
    if not internal_kv._internal_kv_initialized():
        return None
    try:
        value = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
    except Exception:  # the cluster's head does not answer just now
        return None
    return value.decode() if value else None


def _write(key: str, value: str) -> None:
    if internal_kv._internal_kv_initialized():
        with contextlib.suppress(Exception):  # as above; the next one says the same
            internal_kv._internal_kv_put(key, value, namespace=NAMESPACE)


def _is_drained(node_id: str | None) -> bool:
    if node_id is None or not ray.is_initialized():
        return False
    try:
        # The same source as Ray Train's own watcher; there is no public one outside of it.
        draining = ray._private.state.state.get_draining_nodes()
    except Exception:  # as above
        return False
    return node_id in draining


def read_capacity(*, is_local: bool) -> Capacity:
    """Ask the cluster that this process has joined."""
    import ray
    from ray._private.state import state

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    drivers = [resources[TRIAL_DRIVER] for resources in alive if TRIAL_DRIVER in resources]
    config = state.get_cluster_config()
    return Capacity(
        nodes=tuple(_node(resources) for resources in alive),
        groups=tuple(map(_group, config.node_group_configs)) if config else (),
        limits=_limits(config.max_resources) if config else (),
        has_autoscaler=not is_local and _has_autoscaler(),
        num_trial_drivers=int(sum(drivers)) if drivers else None,
        is_local=is_local,
    )


def free_text() -> str:
    """What nobody uses now, of what there is."""
    import ray
    from ray._private.state import state

    free = state.available_resources_per_node().values()
    total = ray.cluster_resources()
    parts = [
        f"{sum(node.get(name, 0.0) for node in free):g} of {total.get(name, 0.0):g} {name}s"
        for name in ("CPU", "GPU")
        if total.get(name)
    ]
    return " and ".join(parts or ["0 CPUs"]) + f" on {_count(list(free))}"


def _has_autoscaler() -> bool:
    """Whether nodes have a type: only where an autoscaler watches do they get a name for it.

    Version 1 leaves its state in the key-value store, version 2 in the cluster's status.
    """
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    client = ray._private.worker.global_worker.gcs_client
    found = client.internal_kv_get(ray._private.ray_constants.DEBUG_AUTOSCALING_STATUS.encode())
    report = (json.loads(found) if found else {}).get("autoscaler_report") or {}
    # Where nothing scales, version 1 reports each node as a type of its own, named for its id.
    ids = {f"node_{node['NodeID']}" for node in ray.nodes()}
    if set(report.get("active_nodes") or {}) - ids:
        return True
    status = GetClusterStatusReply()
    status.ParseFromString(client.get_cluster_status())
    states = status.cluster_resource_state.node_states
    return status.HasField("autoscaling_state") and any(n.ray_node_type_name for n in states)


def _node(resources: Mapping[str, float]) -> Node:
    return Node(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


def _group(config: Any) -> NodeGroup:
    count = None if config.max_count < 0 else int(config.max_count)
    return NodeGroup(config.name, _node(config.resources), count)


def _limits(resources: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple((name, float(resources[name])) for name in ("CPU", "GPU") if name in resources)


def _has_no_living_creator(group: Any) -> bool:
    if group.creator_actor_id in BY_DRIVER:
        return True
    creator = ray._private.state.actors(actor_id=group.creator_actor_id.hex())
    return not creator or creator.get("State") == "DEAD"


def _own_job() -> str:
    return str(ray.get_runtime_context().get_job_id())


def _groups() -> Iterator[Any]:
    """The placement groups of all jobs that are not removed."""
    accessor = ray._private.state.state._connect_and_get_accessor()
    for entry in accessor.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(entry)
        if group.state != gcs_pb2.PlacementGroupTableData.REMOVED:
            yield group


def _num_workers() -> int:
    job = ray.JobID.from_hex(_own_job())
    actors = ray._private.state.actors(job_id=job, actor_state_name="ALIVE").values()
    return sum(actor["ActorClassName"].startswith(WORKER_CLASS) for actor in actors)


@dataclass(frozen=True)
class Placements:
    """Of this job's trials: is one waiting for resources, has one its resources?"""

    is_pending: bool
    is_placed: bool


def placements(demand: Demand) -> Placements:
    """How this job's placement groups stand; those of the workers count as placed."""
    job = ray.get_runtime_context().get_job_id()
    # A group's id ends with its job's.
    groups = [g for key, g in placement_group_table().items() if key.endswith(job)]
    return Placements(
        is_pending=any(g["state"] in ("PENDING", "RESCHEDULING") for g in groups),
        is_placed=any(
            g["state"] == "CREATED" and demand.bundle() in g["bundles"].values() for g in groups
        ),
    )


def _controllers() -> set[str]:
    """Ids of the living controllers of Ray Train that belong to this job."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = ray._private.state.actors(job_id=job).values()
    return {
        actor["ActorID"]
        for actor in actors
        if actor["ActorClassName"] == CONTROLLER_CLASS and actor["State"] != "DEAD"
    }
