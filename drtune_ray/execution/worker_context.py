"""What the processes of a study share, without importing what only the workers need.

A trial's driver and its controller (Ray Train) hand the context on: they import neither timm nor
torchvision, which takes seconds in each process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.remote_tables import RemoteTables
from drtune_ray.folders import Folder
from drtune_ray.training.checkpoint import TrialFolder, trial_folder
from drtune_ray.training.reports import CONFIG_TRIAL


def trial_of(config: Mapping[str, Any]) -> TrialConfig:
    """Return the configuration of a trial from the mapping that Tune hands to its process."""
    return TrialConfig.from_mapping(json.loads(config[CONFIG_TRIAL]))


@dataclass(frozen=True)
class WorkerContext:
    """What the workers of a study share; sent to every process once.

    Attributes:
        tables: Plain values of `Tables` by `TrialConfig.tables_key`.
        trials_folder: Folder that holds one folder a trial, named by its number.
        num_threads: Number of torch's threads a worker.
        device: ``cpu`` or ``cuda``.
        artifacts: Artifacts that hold the trials' checkpoints; None keeps them in `trials_folder`.
        shelf: Store of tables for nodes that lack them; None if all nodes share a file system.
        study_id: Id of the study or training.
        hang_seconds: Seconds without progress after which a process counts as hung.
        token: Token that a node must find in the shared storage; None if nothing is shared.
    """

    tables: dict[str, dict[str, Any]]
    trials_folder: Path
    num_threads: int
    device: str
    artifacts: Folder | None = None
    shelf: RemoteTables | None = None
    study_id: str = field(kw_only=True)
    hang_seconds: float = field(kw_only=True)
    token: str | None = field(default=None, kw_only=True)

    def folder(self, number: int) -> TrialFolder:
        """Return the folder of a trial."""
        return trial_folder(self.trials_folder, number, self.artifacts)
