"""What Ray does not promise: private modules, generated protobufs, the internal key-value store.

The only file that reads them; `ray_tune.patches` and `ray_train.worker_group` change Ray's inside.
``tests/execution/test_ray_state.py`` calls each function against the installed Ray, so
that an upgrade that breaks one is named.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import ray
import ray.train
from ray import ActorID
from ray._private.authentication.authentication_token_setup import (
    AUTH_MODE_ENV_VAR,
    AuthenticationTokenLoader,
)
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.state import state
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.experimental import internal_kv
from ray.job_config import JobConfig
from ray.train.v2._internal import constants
from ray.util import placement_group_table

from drtune_ray.execution.capacity import (
    TRIAL_DRIVER,
    Capacity,
    Demand,
    Node,
    NodeGroup,
    nodes_text,
)
from drtune_ray.execution.environment import ADDRESS, environment

NAMESPACE = "drtune-ray"
WORKER_CLASS = "RayTrainWorker"
BY_DRIVER = (b"", ActorID.nil().binary())  # the creator of what a driver itself asked for
DEFAULT_TOKEN_FILE = "~/.ray/auth_token"  # nosec B105 # the name of a file
CONTROLLER_CLASS = "TrainController"


# ---- the key-value store on the cluster's head


def read_value(key: str) -> str | None:
    """Return a value of the key-value store; None if there is none or the head does not answer."""
    if not internal_kv._internal_kv_initialized():
        return None
    try:
        value = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
    except Exception:  # the cluster's head does not answer just now
        return None
    return value.decode() if value else None


def write_value(key: str, value: str) -> None:
    """Write a value to the key-value store; nothing happens while the head does not answer."""
    if internal_kv._internal_kv_initialized():
        with contextlib.suppress(Exception):  # as above; the next one says the same
            internal_kv._internal_kv_put(key, value, namespace=NAMESPACE)


def keys_below(prefix: str) -> list[str] | None:
    """Return the sorted keys that begin with a prefix; None if the head does not answer."""
    try:
        keys = internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)
    except Exception:  # as above
        return None
    return sorted(key.decode() for key in keys)


def remove_below(prefix: str) -> None:
    """Remove the values whose keys begin with a prefix."""
    with contextlib.suppress(Exception):  # the head is gone, and everything with it
        internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=NAMESPACE)


def register_job() -> None:
    """Record at the cluster's head that this job is one of ours."""
    internal_kv._internal_kv_put(_job_key(own_job()), b"1", namespace=NAMESPACE)


def forget_job(job: str) -> None:
    """Remove the record of `register_job`."""
    internal_kv._internal_kv_del(_job_key(job), namespace=NAMESPACE)


def registered_ended_jobs() -> set[str]:
    """Return the ids of our jobs that have ended."""
    ended = {job["JobID"] for job in state.job_table() if job["IsDead"]}
    registered = internal_kv._internal_kv_list(_job_key(""), namespace=NAMESPACE)
    return {job for job in ended if _job_key(job) in registered}


def _job_key(job: str) -> bytes:
    return f"jobs/{job}".encode()


# ---- what workers import


class _FixedPaths(list[str]):
    """A list to which Ray cannot add the current directory and the script's, as it does (2.60)."""

    def extend(self, paths: Iterable[str]) -> None:
        """Add nothing."""


def paths_of_workers(paths: Sequence[str]) -> JobConfig:
    """Return a job's configuration whose workers search these paths, in this order, and no more.

    ``PYTHONPATH`` would not do: joined with one that is not set on a node, it ends with an empty
    entry, the directory in which Ray was started there.
    """
    config = JobConfig()
    config._py_driver_sys_path = _FixedPaths(reversed(paths))  # each is put before the others
    return config


# ---- nodes


def is_drained(node_id: str | None) -> bool:
    """Return whether a node is being drained, such as a spot machine before it is taken away."""
    if node_id is None or not ray.is_initialized():
        return False
    try:
        # The same source as Ray Train's own watcher; there is no public one outside of it.
        draining = state.get_draining_nodes()
    except Exception:  # as above
        return False
    return node_id in draining


def read_capacity(*, is_local: bool) -> Capacity:
    """Return what the nodes of the joined cluster have, and what its autoscaler may add.

    Args:
        is_local: Whether this process started the cluster itself.
    """
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
    """Return the resources that are free now, of all there are, as a phrase."""
    free = state.available_resources_per_node().values()
    total = ray.cluster_resources()
    parts = [
        f"{sum(node.get(name, 0.0) for node in free):g} of {total.get(name, 0.0):g} {name}s"
        for name in ("CPU", "GPU")
        if total.get(name)
    ]
    return " and ".join(parts or ["0 CPUs"]) + f" on {nodes_text(list(free))}"


def session_folder() -> Path:
    """Return the folder that Ray writes logs and spilled objects to on this node."""
    return Path(ray._private.worker.global_worker.node.get_session_dir_path())


def kill_started() -> None:
    """Kill the processes of Ray that this process has started; the workers end with them."""
    node = ray._private.worker.global_worker.node
    node.kill_all_processes(check_alive=False, allow_graceful=False)


def _has_autoscaler() -> bool:
    """Whether nodes have a type: only where an autoscaler watches do they get a name for it.

    Version 1 leaves its state in the key-value store, version 2 in the cluster's status.
    """
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


# ---- placement groups and actors


def has_no_living_creator(group: Any) -> bool:
    """Return whether the actor that made a placement group is dead, or it was made by a driver."""
    if group.creator_actor_id in BY_DRIVER:
        return True
    creator = ray._private.state.actors(actor_id=group.creator_actor_id.hex())
    return not creator or creator.get("State") == "DEAD"


def own_job() -> str:
    """Return the id of this job, in hexadecimal digits."""
    return str(ray.get_runtime_context().get_job_id())


def placement_groups() -> Iterator[Any]:
    """Yield the entries of all jobs' placement groups that are not removed."""
    accessor = state._connect_and_get_accessor()
    for entry in accessor.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(entry)
        if group.state != gcs_pb2.PlacementGroupTableData.REMOVED:
            yield group


def num_train_workers() -> int:
    """Return how many workers of Ray Train this job has."""
    job = ray.JobID.from_hex(own_job())
    actors = ray._private.state.actors(job_id=job, actor_state_name="ALIVE").values()
    return sum(actor["ActorClassName"].startswith(WORKER_CLASS) for actor in actors)


@dataclass(frozen=True)
class Placements:
    """How the placement groups of this job's trials stand.

    Attributes:
        is_pending: Whether one waits for resources.
        is_placed: Whether one has its resources.
    """

    is_pending: bool
    is_placed: bool


def placements(demand: Demand) -> Placements:
    """Return how this job's placement groups stand; those of the workers count as placed."""
    job = ray.get_runtime_context().get_job_id()
    # A group's id ends with its job's.
    groups = [g for key, g in placement_group_table().items() if key.endswith(job)]
    return Placements(
        is_pending=any(g["state"] in ("PENDING", "RESCHEDULING") for g in groups),
        is_placed=any(
            g["state"] == "CREATED" and demand.bundle() in g["bundles"].values() for g in groups
        ),
    )


def train_controllers() -> set[str]:
    """Return the ids of this job's living controllers of Ray Train."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = ray._private.state.actors(job_id=job).values()
    return {
        actor["ActorID"]
        for actor in actors
        if actor["ActorClassName"] == CONTROLLER_CLASS and actor["State"] != "DEAD"
    }


def end_actor(actor_id: str) -> None:
    """Kill an actor of which nothing but its id is known, and do not restart it."""
    ray._private.worker.global_worker.core_worker.kill_actor(ActorID.from_hex(actor_id), True)


@contextlib.contextmanager
def own_cluster() -> Iterator[None]:
    """Have Ray look for the dashboard in this process's own cluster.

    Ray looks for it in the one that was started last on the machine (Ray 2.60), also when an actor
    of Ray Train's asks whether a controller lives: that of another cluster knows no such
    controller, and the actor would remove the workers of one that trains.
    """
    constants.ENV_VARS_TO_PROPAGATE.add(ADDRESS)
    with environment({ADDRESS: ray.get_runtime_context().gcs_address}):
        yield


# ---- authentication


def sends_token() -> bool:
    """Return whether Ray sends a token from this process (``RAY_AUTH_MODE=token``)."""
    return bool(is_token_auth_enabled())


def token_of_this_machine() -> str | None:
    """Return the token that Ray sends from this machine; None if there is none."""
    loader: Any = AuthenticationTokenLoader.instance()
    if not loader.has_token(ignore_auth_mode=True):
        return None
    return str(loader.get_raw_token(ignore_auth_mode=True))


def keep_token_private() -> None:
    """Make the file of the token that Ray has written, or is about to, readable by its user alone.

    Ray writes it as the umask says, which mostly lets every user of the machine read it (2.60).

    Raises:
        OSError: If the file cannot be made.
    """
    mode = os.environ.get(AUTH_MODE_ENV_VAR)  # unset: a Ray that is started here uses the token
    path = Path(DEFAULT_TOKEN_FILE).expanduser()
    if mode is not None and mode.lower() != "token":
        return
    if token_of_this_machine() is None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)  # Ray fills it
    if path.exists() and path.stat().st_uid == os.geteuid():
        path.chmod(0o600)


def token_file() -> Path:
    """Return the file in which Ray looks for the token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_TOKEN_FILE).expanduser()


def head_refuses(address: str, token: str | None, seconds: float) -> bool:
    """Return whether the head of a cluster refuses a request with this token.

    Args:
        address: HOST:PORT of the head.
        token: The token to send; None sends none.
        seconds: How long the head may take to answer.

    Raises:
        ConnectionError: If something else answers, or nothing; its text is the status code.
    """
    header = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            request = gcs_service_pb2.GetClusterIdRequest()
            stub.GetClusterId(request, timeout=seconds, metadata=header)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return True
            raise ConnectionError(error.code().name) from None
    return False
