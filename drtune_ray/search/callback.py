"""Ray Tune's callback as plain events, for any observer."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune import Callback

from drtune_ray.config import flattened
from drtune_ray.results.trials import OUTCOME, REFERENCE
from drtune_ray.search.protocol import CONFIG_NUMBER, CONFIG_TRIAL, result_history
from drtune_ray.tracking.events import MetricsRecorded, RunFinished, RunStarted, Sink
from drtune_ray.training.records import EpochRecord

logger = logging.getLogger(__name__)

ERROR_TAG = "drtune.error"


class StudyCallback(Callback):  # type: ignore[misc]
    """Emits an event for the start, each epoch and the end of every trial.

    Args:
        study: The Optuna study, asked what became of a trial.
        emit: Takes the events.
    """

    def __init__(self, study: optuna.Study, emit: Sink) -> None:
        self._study, self._emit = study, emit
        self._seen: set[tuple[int, int]] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a restore that is never asked for."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins or goes on."""
        number = trial.config[CONFIG_NUMBER]
        self._emit(run_started(self._frozen(number), json.loads(trial.config[CONFIG_TRIAL])))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended; epochs that a former driver missed are told too."""
        number = trial.config[CONFIG_NUMBER]
        for record in result_history(result):
            if (number, record.epoch) not in self._seen:
                self._seen.add((number, record.epoch))
                self._emit(epoch_event(number, record))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended; Optuna knows how."""
        self._finish(trial.config[CONFIG_NUMBER])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed for the last time."""
        number = trial.config[CONFIG_NUMBER]
        error = (str(trial.get_error() or "").strip().splitlines() or ["unknown error"])[-1]
        logger.warning("trial %d: the machine failed: %s", number, error)
        self._finish(number, {ERROR_TAG: error})

    def _finish(self, number: int, tags: dict[str, str] | None = None) -> None:
        frozen = self._frozen(number)
        if frozen.state != TrialState.RUNNING:
            self._emit(replace(run_finished(frozen), tags=tags or {}))

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]


def run_started(trial: FrozenTrial, config: dict[str, Any]) -> RunStarted:
    """The start of a trial."""
    reference = trial.user_attrs.get(REFERENCE)
    name = f"trial-{trial.number:04d}" + (f"-{reference}" if reference else "")
    tags = {"drtune.reference": reference} if reference else {}
    return RunStarted(trial.number, name, flattened(config), tags)


def epoch_event(number: int | None, record: EpochRecord) -> MetricsRecorded:
    """The end of an epoch."""
    return MetricsRecorded(number, record.epoch, record.metrics, record.time_ms)


def run_finished(trial: FrozenTrial) -> RunFinished:
    """The end of a trial as Optuna holds it; the same whenever it is asked."""
    ended = trial.datetime_complete
    return RunFinished(
        trial.number,
        trial.state.name,
        trial.user_attrs.get(OUTCOME, ""),
        {},
        {},
        int(ended.timestamp() * 1000) if ended else 0,
    )
