"""The output of a study: the winner's model, and the best checkpoints for MLflow."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from drtune_ray.config.study import StudyConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables
from drtune_ray.data.table_store import TableStore
from drtune_ray.errors import CheckpointError
from drtune_ray.execution.run_context import RunContext
from drtune_ray.folders import as_problem
from drtune_ray.results.trials import TrialSummary, best_first, config_of
from drtune_ray.results.winner import write_winner
from drtune_ray.storage.record import WINNER_NAME
from drtune_ray.study.final_fit import FinalFit, final_fit
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

logger = logging.getLogger(__name__)


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

        If the final fit diverges, the result says so and the winner's best seed is shipped.
        """
        config, values = config_of(result.shipped), result.shipped.config
        folder, checked = self.run.checkpoints(result.shipped.number), self.checked
        again = final_fit(result, self.config.final_fit, checked)
        if again is not None:
            outcome = self._train(again)
            result = replace(result, final_fit=again.about(outcome))
            if result.is_fitted_again:
                config, checked = again.config, again.checked
                values = config.to_mapping()
                folder = self.run.checkpoints(again.name)
        tables = self._tables(checked, config)
        content = (folder.path.name, tables.images.name, tables.backbone.name)
        write_winner(
            self.config.folder / WINNER_NAME,
            self._weights(folder),
            tables.backbone,
            tables.classes,
            config,
            result.about(),
            recorded_identity(values, *content),
        )
        return result

    def keep_top_checkpoints(self, trials: Iterable[TrialSummary]) -> None:
        """Send MLflow copies of the best weights of the best trials."""
        for trial in best_first(trials)[: self.config.tracking.num_top_checkpoints]:
            weights = self._weights(self.run.checkpoints(trial.number))
            try:
                check_best(read_checkpoint(weights), weights, None, trial.best_val_accuracy)
            except CheckpointError as error:
                logger.warning("trial %d's weights are not sent to MLflow: %s", trial.number, error)
            else:
                self.run.emit(FilesReady(trial.number, str(weights), "checkpoint"))

    def _train(self, again: FinalFit) -> str:
        training = again.config.training
        self.run.cluster.on_notice(
            f"Final fit: trial {again.source}'s configuration on {again.checked.num_train} images, "
            f"training and validation together, to epoch {training.last_epoch}"
        )
        tables = self._tables(again.checked, again.config)
        return again.train(self.run, tables)

    def _tables(self, checked: StudyInputs, config: TrialConfig) -> Tables:
        device = preparing_device(self.config.resources, self.run.cluster.capacity)[0]
        tables = build_tables(checked, config, self.store, device)
        self.store.keep_limit()
        return tables

    def _weights(self, folder: TrialFolder) -> Path:
        with as_problem(self.run.artifacts.uri):
            return folder.fetch_best()
