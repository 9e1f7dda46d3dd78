"""The resident actor: runs one-worker trials one after another in one warm process.

Process, torch, memory-mapped tables and the pretrained weights stay; everything that a trial
changes is built anew for each (`train_epochs`), so a trial that runs third equals the same trial
in a fresh process bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ray import tune

from drtune_ray.config.trial import DataConfig, TrialConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.remote_tables import TableShelf, fetch_tables
from drtune_ray.folders import Folder
from drtune_ray.search.lifeline import Lifeline
from drtune_ray.search.protocol import (
    CONFIG_NUMBER,
    CONFIG_TRIAL,
    OUT_OF_MEMORY,
    failed_by_point,
    trial_result,
)
from drtune_ray.search.shared import check_token
from drtune_ray.training.backbones import Backbone, read_backbone
from drtune_ray.training.checkpoint import TrialFolder, trial_folder, trial_identity
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.records import EpochReport, SavePoint


@dataclass(frozen=True)
class Workplace:
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
    shelf: TableShelf | None = None
    study_id: str = field(kw_only=True)
    hang_seconds: float = field(kw_only=True)
    token: str | None = field(default=None, kw_only=True)

    def folder(self, number: int) -> TrialFolder:
        """The folder of a trial."""
        return trial_folder(self.trials_folder, number, self.artifacts)


class Workshop:
    """Opens the shared tables and starts trials over them.

    Args:
        workplace: Where everything lies.
        device: Where to train; by default the first device of the workplace's kind.
    """

    def __init__(self, workplace: Workplace, device: torch.device | None = None) -> None:
        check_token(workplace.trials_folder.parent, workplace.token, workplace.artifacts)
        self.workplace = workplace
        self._device = device or torch.device(workplace.device)
        self._opened: _Opened | None = None

    def epochs(
        self, config: TrialConfig, folder: TrialFolder, lifeline: Lifeline
    ) -> Iterator[EpochReport | SavePoint]:
        """Train a configuration from its newest sound checkpoint, or from the start.

        Args:
            config: The trial.
            folder: Its checkpoints.
            lifeline: Asked for saves and told of progress.
        """
        opened = self._open(config)
        content = (opened.tables.images.name, opened.tables.backbone.name)
        return train_epochs(
            config,
            opened.data,
            opened.backbone,
            resume=folder.begin(trial_identity(config, folder.path.name, *content)),
            device=self._device,
            num_threads=self.workplace.num_threads,
            save_requested=lifeline.save_requested,
            on_progress=lifeline.progressed,
        )

    def _open(self, config: TrialConfig) -> _Opened:
        """The tables of a trial; those of the trial before where they are the same."""
        last, wanted = self._opened, (config.tables_key, config.data)
        if last is not None and last.wanted == wanted:
            return last
        tables = Tables.from_mapping(self.workplace.tables[config.tables_key])
        if self.workplace.shelf is not None:
            fetch_tables(tables, self.workplace.shelf)
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


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """Ray Tune's class trainable; one step is one epoch."""

    def setup(self, config: dict[str, Any], workplace: Workplace) -> None:
        """Open what the trials share."""
        self._epochs: Iterator[EpochReport | SavePoint] = iter(())
        self._last: dict[str, Any] | None = None
        self._lifeline = Lifeline(workplace.study_id, workplace.hang_seconds)
        with self._lifeline.guarding(workplace.folder(config[CONFIG_NUMBER]).path):
            self._workshop = Workshop(workplace)
            self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in the same process."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train until the end of the next epoch.

        What the point itself causes comes back as a result; only the machine's failures are
        exceptions, which Tune retries.

        Raises:
            Preempted: If the process was told to leave; all that was trained is saved.
        """
        self._lifeline.leave_if_told()  # between two epochs everything is saved
        try:
            with self._lifeline.guarding(self._folder.path):
                for event in self._epochs:
                    event.save(self._folder)
                    if isinstance(event, EpochReport):
                        self._last = trial_result(event, self._workshop.workplace.num_threads)
                        return self._last
                    self._lifeline.leave_if_told()
        except torch.OutOfMemoryError:
            return failed_by_point(OUT_OF_MEMORY, self._last)
        raise RuntimeError("the trial ended without saying how")

    def cleanup(self) -> None:
        """Drop the trial."""
        self._epochs = iter(())

    def _begin(self, config: dict[str, Any]) -> None:
        trial = TrialConfig.from_mapping(json.loads(config[CONFIG_TRIAL]))
        self._folder = self._workshop.workplace.folder(config[CONFIG_NUMBER])
        self._last = None
        self._epochs = self._first_step_begins(trial, self._folder)

    def _first_step_begins(
        self, trial: TrialConfig, folder: TrialFolder
    ) -> Iterator[EpochReport | SavePoint]:
        # Tune may have given the trial of an actor that takes long to start to one that is free
        # meanwhile. Only the one that is told to step may touch its folder.
        yield from self._workshop.epochs(trial, folder, self._lifeline)
