"""The resident actor: runs one-worker trials one after another in one warm process.

Process, torch, memory-mapped tables and the pretrained weights stay; everything that a trial
changes is built anew for each (`train_epochs`), so a trial that runs third equals the same trial
in a fresh process bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from drtune_ray.config.trial import DataConfig, TrialConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.remote_tables import RemoteTables, fetch_tables
from drtune_ray.execution.guard import WorkerGuard
from drtune_ray.execution.shared_storage import check_token
from drtune_ray.folders import Folder
from drtune_ray.training.backbones import Backbone, read_backbone
from drtune_ray.training.checkpoint import TrialFolder, trial_folder, trial_identity
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.reports import CONFIG_TRIAL, EpochReport, SavePoint


def trial_of(config: Mapping[str, Any]) -> TrialConfig:
    """Return the configuration of a trial from the mapping that Tune hands to its process."""
    return TrialConfig.from_mapping(json.loads(config[CONFIG_TRIAL]))


@dataclass(frozen=True)
class WorkerContext:
    """What all trials of a study share; sent to every actor once.

    Attributes:
        tables: Plain values of `Tables`, by `TrialConfig.tables_key`.
        trials_folder: Holds one folder a trial, named by its number.
        num_threads: torch's threads a worker.
        device: ``cpu`` or ``cuda``.
        artifacts: Holds the folders of the trials instead; None: `trials_folder` does.
        shelf: Where a node finds tables that it lacks; None: all nodes share one file system.
        study_id: Of the study or training.
        hang_seconds: After so long without progress a process is taken for hung.
        token: What a node must find in the shared storage; None: nothing needs to be shared.
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
        """The folder of a trial."""
        return trial_folder(self.trials_folder, number, self.artifacts)


class TrialRunner:
    """Opens the shared tables and starts trials over them.

    Args:
        context: Where everything lies.
        device: Where to train; by default the first device of the context's kind.
    """

    def __init__(self, context: WorkerContext, device: torch.device | None = None) -> None:
        check_token(context.trials_folder.parent, context.token, context.artifacts)
        self.context = context
        self._device = device or torch.device(context.device)
        self._opened: _Opened | None = None

    def epochs(
        self, config: TrialConfig, folder: TrialFolder, guard: WorkerGuard
    ) -> Iterator[EpochReport | SavePoint]:
        """Train a configuration from its newest sound checkpoint, or from the start.

        Args:
            config: The trial.
            folder: Its checkpoints.
            guard: Asked for saves and told of progress.
        """
        opened = self._open(config)
        content = (opened.tables.images.name, opened.tables.backbone.name)
        return train_epochs(
            config,
            opened.data,
            opened.backbone,
            resume=folder.begin(trial_identity(config, folder.path.name, *content)),
            device=self._device,
            num_threads=self.context.num_threads,
            save_requested=guard.save_requested,
            on_progress=guard.progressed,
        )

    def _open(self, config: TrialConfig) -> _Opened:
        """The tables of a trial; those of the trial before where they are the same."""
        last, wanted = self._opened, (config.tables_key, config.data)
        if last is not None and last.wanted == wanted:
            return last
        tables = Tables.from_mapping(self.context.tables[config.tables_key])
        if self.context.shelf is not None:
            fetch_tables(tables, self.context.shelf)
        is_kept = last is not None and last.tables.backbone == tables.backbone
        backbone = last.backbone if last and is_kept else read_backbone(tables.backbone)
        data = TrainingData(tables, config.data, backbone.normalization.interpolation)
        self._opened = _Opened(wanted, tables, backbone, data)
        return self._opened


@dataclass(frozen=True)
class _Opened:
    wanted: tuple[str, DataConfig]
    tables: Tables
    backbone: Backbone
    data: TrainingData
