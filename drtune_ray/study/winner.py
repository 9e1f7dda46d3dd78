"""The output of a study: the winner's model, and the best checkpoints for MLflow."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drtune_ray.config.study import StudyConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.data.table_store import TableStore
from drtune_ray.errors import CheckpointError, first_line
from drtune_ray.execution.run_context import RunContext
from drtune_ray.folders import as_problem
from drtune_ray.results.trials import TrialSummary, best_first, config_of
from drtune_ray.results.winner import is_sound, write_winner
from drtune_ray.storage.record import WINNER_NAME, is_done
from drtune_ray.study.final_fit import AGAIN, Refit, final_fit
from drtune_ray.study.inputs import StudyInputs
from drtune_ray.study.result import StudyResult
from drtune_ray.study.tables import build_tables, preparing_device
from drtune_ray.tracking.events import FilesReady
from drtune_ray.training.checkpoint import (
    TrialFolder,
    check_best,
    read_checkpoint,
    recorded_identity,
)
from drtune_ray.training.reports import COMPLETED, PATIENCE

logger = logging.getLogger(__name__)


def is_finished(config: StudyConfig, num_trials: int | None = None) -> bool:
    """Return whether a study is done and its model is whole; a lost one is written again.

    Args:
        config: The study.
        num_trials: Number of trials with a result now; None if not known yet.
    """
    return is_done(config.folder, config, num_trials) and is_sound(config.folder / WINNER_NAME)


@dataclass(frozen=True)
class _Source:
    """A training whose weights become the model.

    Attributes:
        config: Its configuration.
        values: The configuration as it was recorded.
        checked: Its images and weights.
        folder: Folder of its checkpoints.
    """

    config: TrialConfig
    values: Mapping[str, Any]
    checked: StudyInputs
    folder: TrialFolder


@dataclass(frozen=True)
class WinnerWriter:
    """Writes the winner's model, and sends the best checkpoints to MLflow.

    Attributes:
        config: The study.
        checked: Images and weights of the study.
        store: Table store of the storage.
        run: The study's run, for a final fit.
    """

    config: StudyConfig
    checked: StudyInputs
    store: TableStore
    run: RunContext

    def write_winner(self, result: StudyResult) -> StudyResult:
        """Write the model, after a final fit if there is one; return the updated result.

        If the final fit diverges, the result says so and the winner's best seed is shipped. If the
        weights of that seed are lost, it is trained again.
        """
        source = self._of_trial(result.shipped)
        again = final_fit(result, self.config.final_fit, self.checked)
        if again is not None:
            outcome = self._train(again)
            result = replace(result, final_fit=again.about(outcome))
            if result.is_fitted_again:
                source = self._of_refit(again)
        about = result.about()
        try:
            self._write(source, about)
        except CheckpointError as error:
            if result.is_fitted_again:
                raise
            self._write(*self._trained_again(result.shipped, about, error))
        return result

    def keep_top_checkpoints(self, trials: Iterable[TrialSummary]) -> None:
        """Send MLflow copies of the best weights of the best trials."""
        for trial in best_first(trials)[: self.config.tracking.num_top_checkpoints]:
            try:
                weights = self._weights(self.run.checkpoints(trial.number))
                best = read_checkpoint(weights)
                check_best(best, weights, None, trial.metric, trial.best_value)
            except CheckpointError as error:
                logger.warning("trial %d's weights are not sent to MLflow: %s", trial.number, error)
            else:
                self.run.emit(FilesReady(trial.number, str(weights), "checkpoint"))

    def _write(self, source: _Source, about: dict[str, Any]) -> None:
        """Write the model.

        Raises:
            CheckpointError: If the weights are lost, damaged or others.
        """
        config, tables = source.config, self._tables(source.checked, source.config)
        content = (source.folder.path.name, tables.images.name, tables.backbone.name)
        write_winner(
            self.config.folder / WINNER_NAME,
            self._weights(source.folder),
            tables.backbone,
            tables.classes,
            config,
            about,
            recorded_identity(source.values, *content),
            source.checked.splits.whites,
        )

    def _of_trial(self, trial: TrialSummary) -> _Source:
        folder = self.run.checkpoints(trial.number)
        return _Source(config_of(trial), trial.config, self.checked, folder)

    def _of_refit(self, again: Refit) -> _Source:
        folder = self.run.checkpoints(again.name)
        return _Source(again.config, again.config.to_mapping(), again.checked, folder)

    def _train(self, again: Refit) -> str:
        training = again.config.training
        self.run.cluster.on_notice(
            f"Final fit: trial {again.source}'s configuration on {again.checked.num_train} images, "
            f"training and validation together, to epoch {training.last_epoch}"
        )
        return again.train(self.run, self._tables(again.checked, again.config))

    def _trained_again(
        self, trial: TrialSummary, about: dict[str, Any], error: CheckpointError
    ) -> tuple[_Source, dict[str, Any]]:
        """Train a trial again whose weights are lost; return it with its entry for the card.

        Raises:
            CheckpointError: `error`, if it cannot be trained.
        """
        again = Refit(trial.number, config_of(trial), self.checked, AGAIN)
        self.run.cluster.on_notice(
            f"Trial {trial.number} is trained again, with the same settings and seed, since its "
            f"weights are lost: {first_line(error)}"
        )
        outcome = again.train(self.run, self._tables(again.checked, again.config))
        if outcome not in (COMPLETED, PATIENCE):
            raise error
        source = self._of_refit(again)
        best, metric = read_checkpoint(self._weights(source.folder)), trial.metric
        value = best["record"]["metrics"][metric.best]
        found = {metric.measure: value, "trained_again": again.about(outcome)}
        return source, about | found

    def _tables(self, checked: StudyInputs, config: TrialConfig) -> Tables:
        device = preparing_device(self.config.resources, self.run.cluster.capacity)[0]
        tables = build_tables(checked, config, self.store, device)
        self.store.keep_limit()
        return tables

    def _weights(self, folder: TrialFolder) -> Path:
        with as_problem(self.run.artifacts.uri):
            try:
                return folder.fetch_best()
            except FileNotFoundError:
                lost = CheckpointError(f"{folder.best} is missing")
        raise lost
