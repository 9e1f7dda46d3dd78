"""A group of Ray Train workers: its limits, and what its controller does for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from drtune_ray.config import ResourcesConfig, TrainingConfig
from drtune_ray.search.lifeline import ask_to_save, listen_for_sigterm

# A group that may be smaller is asked for by what Ray believed of the cluster some seconds ago:
# where a node has gone meanwhile, the request must soon be made again.
ELASTIC_START_SECONDS = 30.0
# Within it a group whose size changes must have saved; it loses no more than it did since.
RESIZE_SAVE_SECONDS = 60.0


class GroupCare(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
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
        return resources.wait_seconds
    return min(resources.wait_seconds, ELASTIC_START_SECONDS)


@contextmanager
def train_environment(resources: ResourcesConfig, training: TrainingConfig) -> Iterator[None]:
    """Within, a trainer that is started keeps to the limits of the configuration.

    Ray Train reads them from the environment of the process that calls ``fit`` and hands them on.
    """
    values = {
        # A process that answers nothing; one that runs and does not train ends itself (`Lifeline`).
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(resources.hang_seconds),
        # Workers wait for each other when they report.
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(resources.hang_seconds),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_seconds(resources, training)),
    }
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
