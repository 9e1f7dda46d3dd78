"""A study or training that this process, and no other, drives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from drtune_ray.execution.capacity import Capacity, Cluster
from drtune_ray.execution.failures import full_disk_as_problem
from drtune_ray.execution.interrupts import signals_as_interrupt
from drtune_ray.execution.shared_storage import shared_folder
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.driver_lock import driver_lock


@dataclass(frozen=True)
class Opened:
    """A study or training that is open for its driver.

    Attributes:
        cluster: Where its trials run; None where it is done and no cluster was joined.
        is_restored: Whether it was brought back from the artifacts.
    """

    cluster: Cluster | None
    is_restored: bool


@contextmanager
def opened_study(
    folder: Path,
    artifacts: StudyArtifacts,
    joining: AbstractContextManager[Capacity | None],
    on_notice: Callable[[str], None],
) -> Iterator[Opened]:
    """Open a study or training for its only driver: cluster, locks, shared storage, artifacts.

    Args:
        folder: Folder of the study or training.
        artifacts: Its files that outlive this machine's disk.
        joining: Joins the cluster; gives None where nothing is left to run.
        on_notice: Takes a line for the user while no trial can start.

    Raises:
        ConfigError: If the artifacts hold another study of this name.
        EnvironmentProblem: If the disk is full, the cluster cannot run a trial, another process
            drives the study, or a node does not see the storage.
        KeyboardInterrupt: For Ctrl-C and SIGTERM.
    """
    with (
        full_disk_as_problem(folder),
        joining as capacity,
        driver_lock(folder),
        artifacts.lease(),
        signals_as_interrupt(),
        shared_folder(folder, capacity, artifacts.trials) as token,
    ):
        cluster = Cluster(capacity, token, on_notice) if capacity else None
        yield Opened(cluster, artifacts.restore())
