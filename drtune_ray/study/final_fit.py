"""Trainings after the search: the final fit, and a trial again whose weights are lost.

The final fit trains the winner's configuration on training and validation images together. No
images are left to choose an epoch by. The fit therefore ends at the epoch at which the winner was
best, on the winner's schedule, and returns the weights of that epoch.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from optuna.trial import TrialState

from drtune_ray.config.study import FinalFitConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.data.splits import TRAIN, VALIDATION
from drtune_ray.errors import CheckpointError
from drtune_ray.execution.ray_train.fit import fit
from drtune_ray.execution.run_context import RunContext
from drtune_ray.folders import as_problem
from drtune_ray.results.trials import config_of
from drtune_ray.results.used_settings import resolved_settings, unused_settings
from drtune_ray.search.finalists import best_finalist
from drtune_ray.study.inputs import StudyInputs
from drtune_ray.study.result import StudyResult
from drtune_ray.tracking.events import RunFinished, RunStarted
from drtune_ray.training.checkpoint import (
    IDENTITY,
    TrialFolder,
    read_checkpoint,
    trial_identity,
)
from drtune_ray.training.reports import COMPLETED, OUTCOME
from drtune_ray.values import flattened

FINAL_FIT, AGAIN = "final-fit", "again"


@dataclass(frozen=True)
class Refit:
    """A training of one configuration after the search.

    Attributes:
        source: Number of the trial whose configuration it is.
        config: Configuration, with its last epoch and its workers.
        checked: Images of the training; a final fit has none for validation.
        kind: `FINAL_FIT` or `AGAIN`.
    """

    source: int
    config: TrialConfig
    checked: StudyInputs
    kind: str

    @property
    def name(self) -> str:
        """Name of the run and folder."""
        return f"{self.kind}-{self.source:05d}"

    def about(self, outcome: str) -> dict[str, Any]:
        """Return the training's entry in the model's card, as plain values."""
        return {
            "trial": self.source,
            "seed": self.config.seed,
            "epoch": self.config.training.last_epoch,
            "num_images": self.checked.num_train,
            "outcome": outcome,
        }

    def train(self, run: RunContext, tables: Tables) -> str:
        """Train or resume it, unless it was trained before.

        Args:
            run: The study's run.
            tables: Tables of images and features.

        Returns:
            The outcome; `COMPLETED` if the weights exist.

        Raises:
            EnvironmentProblem: If the workers failed more often than they are retried.
        """
        checkpoints = run.checkpoints(self.name)
        with as_problem(run.artifacts.uri):
            # With a checkpoint to resume from, some of its epochs may not be recorded yet.
            if checkpoints.newest() is None and self._is_trained(checkpoints, tables):
                return COMPLETED
        tags = {f"drtune.{self.kind.replace('-', '_')}": str(self.source)}
        run.emit(
            RunStarted(
                self.name,
                self.name,
                flattened(self.config.to_mapping()),
                tags,
                unused=unused_settings(self.config),
                resolved=resolved_settings(self.config),
            )
        )
        try:
            result = fit(run, self.config, tables, checkpoints, key=self.name)
        except BaseException:  # whatever it was, the run may not stay RUNNING
            run.emit(RunFinished(self.name, "INTERRUPTED", "interrupted", {}, {}))
            raise
        outcome = str(result[OUTCOME])
        state = TrialState.COMPLETE if outcome == COMPLETED else TrialState.PRUNED
        run.emit(RunFinished(self.name, state.name, outcome, {}, {}))
        checkpoints.drop_resumable()
        return outcome

    def _is_trained(self, checkpoints: TrialFolder, tables: Tables) -> bool:
        """Return whether weights of this very training, at its last epoch, exist."""
        try:
            best = read_checkpoint(checkpoints.fetch_best())
        except (CheckpointError, FileNotFoundError):
            return False
        content = (self.name, tables.images.name, tables.backbone.name)
        is_last = best["record"]["epoch"] == self.config.training.last_epoch
        return is_last and best.get(IDENTITY) == trial_identity(self.config, *content)


def final_fit(result: StudyResult, asked: FinalFitConfig, checked: StudyInputs) -> Refit | None:
    """Return the final fit of a study; None if the study has none.

    The fit has the seed of the run whose weights would be shipped without it. Its last epoch is the
    median of the best epochs of the winner's runs on new seeds, or without finalists the best epoch
    of the winning trial.

    Args:
        result: Result of the study.
        asked: Settings of the final fit.
        checked: Images and weights of the study.
    """
    if asked.images == "none":
        return None
    finalist = best_finalist(result.finalists)
    runs = finalist.runs if finalist else (result.winner,)
    values: dict[str, Any] = {
        "training.stop_epoch": round(statistics.median(run.best_epoch or 1 for run in runs)),
        "training.patience_epochs": None,
    }
    config = with_final_workers(config_of(result.shipped).with_values(values), asked)
    return Refit(result.winner.number, config, without_validation(checked), FINAL_FIT)


def with_final_workers(config: TrialConfig, asked: FinalFitConfig) -> TrialConfig:
    """Return a configuration with the workers of the final fit."""
    if asked.workers is None:
        return config
    return config.with_values({"training.workers": asked.workers})


def without_validation(checked: StudyInputs) -> StudyInputs:
    """Return the inputs with the validation images moved to training; the test stays sealed."""
    splits = checked.splits
    former = splits.manifest["split"].to_pylist()
    column = pa.array([TRAIN if split == VALIDATION else split for split in former], pa.string())
    at = splits.manifest.schema.get_field_index("split")
    manifest = splits.manifest.set_column(at, "split", column)
    return replace(checked, splits=replace(splits, manifest=manifest))
