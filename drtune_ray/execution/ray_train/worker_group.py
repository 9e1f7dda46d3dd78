"""A group of Ray Train workers: its limits, and what its controller does for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.trial import TrainingConfig
from drtune_ray.execution.environment import environment
from drtune_ray.execution.guard import listen_for_sigterm
from drtune_ray.execution.heartbeat import ask_to_save
from drtune_ray.execution.ray_state import own_cluster

# A group that may be smaller is asked for by what Ray believed of the cluster some seconds ago:
# where a node has gone meanwhile, the request must soon be made again.
ELASTIC_START_SECONDS = 30.0
# The study gives up first, so that no request is made while its job is ending.
LATER_SECONDS = 60.0
# Within it a group whose size changes must have saved; it loses no more than it did since.
RESIZE_SAVE_SECONDS = 60.0


class WorkerGroupCallbacks(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Runs in the controller of a trial.

    SIGTERM makes a worker save and leave; a group whose size is to change saves first.

    Args:
        study_id: Of the study or training.
        trial_name: Name of the trial's folder.
    """

    def __init__(self, study_id: str, trial_name: str) -> None:
        self._study_id, self._trial_name = study_id, trial_name
        self._is_running = False

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Its actors are there; their methods run on the main thread."""
        worker_group.execute(listen_for_sigterm)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Remember whether the workers can still be asked for anything."""
        self._is_running = not worker_group_status.errors and not worker_group_status.finished

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """The workers are gone."""
        self._is_running = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Called before every start; save if there is something that runs."""
        if self._is_running:
            ask_to_save(self._study_id, [self._trial_name], RESIZE_SAVE_SECONDS)


def start_seconds(resources: ResourcesConfig, training: TrainingConfig) -> float:
    """How long one request for workers waits before it is made again."""
    if training.min_workers == training.max_workers:
        return resources.wait_seconds + LATER_SECONDS
    return min(resources.wait_seconds, ELASTIC_START_SECONDS)


@contextmanager
def train_environment(resources: ResourcesConfig, training: TrainingConfig) -> Iterator[None]:
    """Within, a trainer that is started keeps to the limits of the configuration.

    Ray Train reads them from the environment of the process that calls ``fit`` and hands them on.
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
