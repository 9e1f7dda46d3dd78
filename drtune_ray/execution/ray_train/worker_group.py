"""A group of Ray Train workers: its time limits and callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.training import TrainingConfig
from drtune_ray.execution.environment import environment
from drtune_ray.execution.guard import listen_for_sigterm
from drtune_ray.execution.heartbeat import ask_to_save
from drtune_ray.execution.ray_state import own_cluster

# An elastic group is requested by the cluster's state of some seconds ago: if a node was lost
# meanwhile, the request must soon be repeated.
ELASTIC_START_SECONDS = 30.0
# The study gives up first, so that nothing is requested while its job is ending.
LATER_SECONDS = 60.0
# Time in which a group must save before its size changes; otherwise it loses the steps since.
RESIZE_SAVE_SECONDS = 60.0


class WorkerGroupCallbacks(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Callbacks in the controller of a trial.

    They make SIGTERM request a save from a worker, and a group save before its size changes.

    Args:
        study_id: Id of the study or training.
        trial_name: Name of the trial's folder.
    """

    def __init__(self, study_id: str, trial_name: str) -> None:
        self._study_id, self._trial_name = study_id, trial_name
        self._is_running = False

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Install the handler of SIGTERM: the actors' methods run on the main thread."""
        worker_group.execute(listen_for_sigterm)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Record whether the workers still run."""
        self._is_running = not worker_group_status.errors and not worker_group_status.finished

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Record that the workers have ended."""
        self._is_running = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Save if workers run; Ray Train calls this before every start as well."""
        if self._is_running:
            ask_to_save(self._study_id, [self._trial_name], RESIZE_SAVE_SECONDS)


def start_seconds(resources: ResourcesConfig, training: TrainingConfig) -> float:
    """Return how many seconds one request for workers waits before it is repeated."""
    if training.min_workers == training.max_workers:
        return resources.wait_seconds + LATER_SECONDS
    return min(resources.wait_seconds, ELASTIC_START_SECONDS)


@contextmanager
def train_environment(resources: ResourcesConfig, training: TrainingConfig) -> Iterator[None]:
    """Set the time limits of trainers that start within a block.

    Ray Train reads them from the environment of the process that calls ``fit`` and passes them on.
    """
    values = {
        # For a process that does not answer; one that runs but does not train ends itself
        # (`WorkerGuard`).
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(resources.hang_seconds),
        # Workers wait for each other when they report.
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(resources.hang_seconds),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_seconds(resources, training)),
    }
    with own_cluster(), environment(values):
        yield
