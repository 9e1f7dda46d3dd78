"""One training over Ray Train's workers, and what its driver watches meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.execution.capacity import Cluster, trial_demand
from drtune_ray.execution.failures import FULL_DISK
from drtune_ray.execution.interrupts import saving_when_interrupted
from drtune_ray.execution.resource_wait import ResourceWait
from drtune_ray.execution.session import scratch_folder
from drtune_ray.execution.worker import Workplace
from drtune_ray.search.identity import SCRATCH_NAME, TRIALS_FOLDER
from drtune_ray.search.protocol import OUT_OF_MEMORY
from drtune_ray.search.servers import StudyArtifacts
from drtune_ray.search.workers import controllers_ended, train_on_workers
from drtune_ray.tracking.events import MetricsRecorded, RunKey, Sink, StepsRecorded
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.records import EpochRecord


@dataclass(frozen=True)
class Fit:
    """A training that no search steers.

    Attributes:
        folder: Of the study or training that it belongs to.
        study_id: Of that.
        resources: What a worker takes.
        artifacts: What outlives this machine's disk.
        cluster: Where the workers run.
        emit: Takes the events.
        disk_error: Why an event was lost, if one was.
    """

    folder: Path
    study_id: str
    resources: ResourcesConfig
    artifacts: StudyArtifacts
    cluster: Cluster
    emit: Sink
    disk_error: Callable[[], OSError | None]

    def train(
        self,
        config: TrialConfig,
        tables: Tables,
        checkpoints: TrialFolder,
        run: RunKey,
        on_interrupt: Callable[[], None],
    ) -> dict[str, Any]:
        """Train, or go on from the newest checkpoint.

        Args:
            config: What to train, on how many workers.
            tables: What it reads.
            checkpoints: Its folder.
            run: Under which the epochs are told.
            on_interrupt: Called when the training is interrupted.

        Returns:
            The last result.

        Raises:
            EnvironmentProblem: If the workers failed more often than they are retried.
        """
        demand = trial_demand(config.training, self.resources)
        wait = ResourceWait(demand, self.resources.wait_seconds, self.cluster.on_notice)

        def on_turn() -> None:
            self.artifacts.check_lease()
            wait.check()
            if (error := self.disk_error()) is not None and error.errno in FULL_DISK:
                raise error

        with (
            scratch_folder(self.folder / SCRATCH_NAME) as scratch,
            controllers_ended(),
            saving_when_interrupted(self.study_id, lambda: [checkpoints.path.name], on_interrupt),
        ):
            return train_on_workers(
                config,
                self._workplace(config, tables, "cuda" if demand.num_gpus else "cpu"),
                self.resources,
                checkpoints,
                scratch,
                lambda record: self._tell(run, record),
                on_turn,
            )

    def _workplace(self, config: TrialConfig, tables: Tables, device: str) -> Workplace:
        return Workplace(
            {config.tables_key: tables.to_mapping()},
            self.folder / TRIALS_FOLDER,
            self.resources.cpus_per_worker,
            device,
            self.artifacts.trials,
            self.artifacts.shelf,
            token=self.cluster.token,
            study_id=self.study_id,
            hang_seconds=self.resources.hang_seconds,
        )

    def _tell(self, run: RunKey, record: EpochRecord) -> None:
        self.emit(MetricsRecorded(run, record.epoch, record.metrics, record.time_ms))
        first = (record.epoch - 1) * len(record.steps) + 1
        self.emit(StepsRecorded(run, first, record.steps, record.time_ms))


def advice(outcome: str, config: TrialConfig) -> str:
    """What to do about a configuration that cannot be trained."""
    if outcome == OUT_OF_MEMORY:
        return (
            f"the GPU's memory does not hold this training: lower "
            f"training.batch_size={config.training.batch_size} or "
            f"data.image_size={config.data.image_size}, or add workers"
        )
    return (
        f"training {outcome}: lower optim.backbone_lr={config.optim.backbone_lr} or "
        f"method.head_lr_multiplier={config.method.head_lr_multiplier}"
    )
