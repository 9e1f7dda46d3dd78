"""Joining or starting Ray, and stopping what was started."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.training import TrainingConfig
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.capacity import Capacity, trial_demand, trials_that_fit
from drtune_ray.execution.cluster_watch import (
    HEAD_SECONDS,
    LOCAL_SECONDS,
    Service,
    watched,
)
from drtune_ray.execution.environment import LOCAL, environment, job_config, ray_address
from drtune_ray.execution.interrupts import signals_as_interrupt
from drtune_ray.import_path import own_paths

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of users must keep their meaning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C must leave trials unfinished, not stopped
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Train's controller looks at its workers every two seconds unless told otherwise.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
}
# For Ray's own processes: those of its dashboard would import from the current directory.
_SAFE_PATH = {"PYTHONSAFEPATH": "1"}
# Of the user's, what training on another node needs as well.
PASSED_ON = ("OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
CONNECT_SECONDS = 10.0


def set_environment() -> None:
    """Set the variables that Ray reads when it is imported; the user's own values stay."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(*, with_dashboard: bool = False) -> Iterator[Capacity]:
    """Join the cluster of ``RAY_ADDRESS``, or start one on this machine and stop it afterwards.

    Args:
        with_dashboard: Start the State API too, which cleans up after nested Ray Train workers.

    Raises:
        EnvironmentProblem: If the cluster cannot be reached.
    """
    set_environment()
    import ray

    from drtune_ray.execution.ray_state import (
        keep_token_private,
        kill_started,
        paths_of_workers,
        read_capacity,
        register_job,
    )

    was_joined = ray.is_initialized()
    address = ray_address()
    is_local = not was_joined and address == LOCAL
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    # Workers may import the package from a checkout that is not installed.
    settings["job_config"] = paths_of_workers(own_paths())
    try:
        if is_local:
            keep_token_private()
            num_cpus = len(os.sched_getaffinity(0))
            # Without an address Ray would look for a cluster that runs on this machine.
            with environment(_SAFE_PATH):
                ray.init(LOCAL, num_cpus=num_cpus, include_dashboard=with_dashboard, **settings)
        elif not was_joined:
            check_address(address)
            ray.init(address, runtime_env={"env_vars": worker_environment()}, **settings)
    except Exception as error:  # a node that starts too slowly raises just that (Ray 2.60)
        ray.shutdown()  # of what it had begun
        raise EnvironmentProblem(_unreachable(address, error)) from None
    try:
        if not is_local:
            from drtune_ray.execution.placement_groups import remove_leftovers

            remove_leftovers()
            register_job()
        # Ray takes SIGTERM for itself when it starts.
        kill = kill_started if is_local else lambda: None
        with signals_as_interrupt(), watched(_services(is_local=is_local), kill):
            yield read_capacity(is_local=is_local)
    finally:
        if not was_joined:
            ray.shutdown()


def _services(*, is_local: bool) -> tuple[Service, ...]:
    """Return what this process needs of Ray: the cluster's head, and this node's process."""
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    seconds = LOCAL_SECONDS if is_local else HEAD_SECONDS
    own = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
    return (
        Service("the head of the Ray cluster", host, int(port), seconds),
        *(
            Service(
                "Ray's process on this node",
                node["NodeManagerAddress"],
                node["NodeManagerPort"],
                LOCAL_SECONDS,
            )
            for node in own
        ),
    )


@contextmanager
def ready_cluster(
    trainings: Mapping[str, TrainingConfig], resources: ResourcesConfig, *, with_dashboard: bool
) -> Iterator[Capacity]:
    """Join a cluster that can hold each training, or refuse before anything is written.

    Args:
        trainings: Trainings by the setting that gives their workers.
        resources: Resources of a worker.
        with_dashboard: Whether the dashboard is needed.

    Raises:
        ConfigError: If the workers' shares of GPUs are invalid.
        EnvironmentProblem: If the cluster cannot be reached, no trial ever fits, or a dashboard
            is needed and does not answer.
    """
    demands = {setting: trial_demand(t, resources) for setting, t in trainings.items()}
    with ray_session(with_dashboard=with_dashboard) as capacity:
        for setting, demand in demands.items():
            trials_that_fit(demand, resources, capacity, setting)
        if with_dashboard:
            from drtune_ray.execution.placement_groups import check_state_api

            check_state_api()
        yield capacity


def worker_environment() -> dict[str, str]:
    """Return the variables for processes on other nodes, without those that the job already sets.

    Nothing else of this process's environment is sent to the cluster, where others can read it.
    """
    wanted = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    wanted |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    set_by_job = (job_config().get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in wanted.items() if name not in set_by_job}


def check_address(address: str) -> None:
    """Check an address at once that Ray would try for minutes.

    Raises:
        ConnectionError: With the reason.
    """
    if address == "auto":
        return
    if "://" in address:
        raise ConnectionError(
            "drtune-ray runs on a node of the cluster: give HOST:PORT as `ray start --head` says "
            "it, or take `drtune-ray submit --address`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConnectionError("it must be HOST:PORT, as `ray start --head` says it")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers there ({error.strerror or error})") from None


def _unreachable(address: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if address == LOCAL:
        return f"Ray cannot be started: {_start_failure(error, reason)}"
    if reason.startswith("Failed to connect"):  # though something answered
        reason += " (if it asks for a token: set RAY_AUTH_MODE=token, and copy ~/.ray/auth_token)"
    return f"the Ray cluster of RAY_ADDRESS={address} cannot be joined: {reason}"


def _start_failure(error: Exception, reason: str) -> str:
    """Return why Ray did not start on this machine, and what to set where that is known."""
    if "AF_UNIX path length" in reason:
        return (
            f"its temporary folder {os.environ.get('RAY_TMPDIR') or tempfile.gettempdir()} has too "
            "long a path for its sockets: set RAY_TMPDIR=/tmp"
        )
    if "timed out during startup" in reason:
        return f"this machine is slow or busy, try again ({reason})"
    home = Path("~").expanduser()
    if isinstance(error, OSError) and error.filename:
        path = Path(error.filename)
        if home in (path, *path.parents) or path in home.parents:
            return f"its token lies below HOME={home} ({reason}): set HOME to a writable folder"
    return reason


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Create an empty folder for a block and delete it afterwards, also a killed driver's."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
