"""What resident actors and Ray Train workers have in common: tables, weights, epochs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from drtune_ray.config.inputs import DataConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.remote_tables import fetch_tables
from drtune_ray.execution.guard import WorkerGuard
from drtune_ray.execution.shared_storage import check_token
from drtune_ray.execution.worker_context import WorkerContext
from drtune_ray.training.backbones import Backbone, read_backbone
from drtune_ray.training.checkpoint import TrialFolder, trial_identity
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.reports import EpochReport, SavePoint


class TrialRunner:
    """Opens the shared tables and starts trials over them.

    Args:
        context: What the workers share.
        device: Device to train on; by default the first one of the context's kind.
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
            folder: Folder for its checkpoints.
            guard: Guard of this process.
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
        """Open the tables of a trial; reuse those of the trial before if they are the same."""
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
