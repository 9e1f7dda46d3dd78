"""What the parts of a running study or training share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.training import TrainingConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.execution.capacity import Cluster, trial_demand
from drtune_ray.execution.resource_wait import ResourceWait
from drtune_ray.execution.worker_context import WorkerContext
from drtune_ray.folders import FULL_DISK
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.record import SCRATCH_NAME, TRIALS_FOLDER
from drtune_ray.tracking.events import Sink
from drtune_ray.training.checkpoint import TrialFolder, named_folder, trial_folder


@dataclass(frozen=True)
class RunContext:
    """What the parts of a running study or training share.

    Attributes:
        folder: Folder of the study or training.
        study_id: Id of the study or training.
        resources: Resources of a worker.
        artifacts: Files that outlive this machine's disk.
        cluster: Where the workers run.
        emit: Takes the events.
        disk_error: Returns the error that lost an event, if one did.
        on_interrupt: Called when the run is interrupted.
    """

    folder: Path
    study_id: str
    resources: ResourcesConfig
    artifacts: StudyArtifacts
    cluster: Cluster
    emit: Sink
    disk_error: Callable[[], OSError | None]
    on_interrupt: Callable[[], None]

    @property
    def trials_folder(self) -> Path:
        """Folder that holds one folder a trial."""
        return self.folder / TRIALS_FOLDER

    @property
    def scratch(self) -> Path:
        """Folder for Ray's own files; disposable."""
        return self.folder / SCRATCH_NAME

    def checkpoints(self, trial: int | str) -> TrialFolder:
        """Return the folder of a trial, by its number, or of another training, by its name."""
        folder_of = trial_folder if isinstance(trial, int) else named_folder
        return folder_of(self.trials_folder, trial, self.artifacts.trials)  # type: ignore[arg-type]

    def worker_context(self, tables: Mapping[str, Tables]) -> WorkerContext:
        """Return what the workers need, given the tables by `TrialConfig.tables_key`."""
        return WorkerContext(
            {key: found.to_mapping() for key, found in tables.items()},
            self.trials_folder,
            self.resources.cpus_per_worker,
            "cuda" if self.resources.worker_gpus(1) else "cpu",
            self.artifacts.trials,
            self.artifacts.shelf,
            token=self.cluster.token,
            study_id=self.study_id,
            hang_seconds=self.resources.hang_seconds,
        )

    def resource_wait(self, training: TrainingConfig) -> ResourceWait:
        """Return the watch that ends the run where no trial gets its resources for too long."""
        demand = trial_demand(training, self.resources)
        return ResourceWait(demand, self.resources.wait_seconds, self.cluster.on_notice)

    def check_disk(self) -> None:
        """Raise the error of a full disk that lost an event, if one did.

        Raises:
            OSError: The error; the run is not done, and the same command sends its end again.
        """
        if (error := self.full_disk()) is not None:
            raise error

    def full_disk(self) -> OSError | None:
        """Return the error of a full disk that lost an event, if one did."""
        error = self.disk_error()
        return error if error is not None and error.errno in FULL_DISK else None
