"""What the spool of a study knows of trials that a damaged journal lost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from drtune_ray.config.metric import METRICS
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.results.events import MARKS
from drtune_ray.results.trials import (
    CONFIG,
    EPOCH_PREFIX,
    OBJECTIVES,
    OUTCOME,
    START_POINT,
    values_by_epoch,
)
from drtune_ray.storage.journal import Missing
from drtune_ray.tracking.events import Event, MetricsRecorded, RunFinished, RunStarted
from drtune_ray.values import nested


@dataclass
class _Told:
    """What the spool knows of a trial, whose values have this name among its metrics."""

    best: str
    start: RunStarted | None = None
    end: RunFinished | None = None
    values: dict[int, float] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Add an event that follows the ones before."""
        if isinstance(event, RunStarted):
            self.start, self.end = event, None  # it resumed
        elif isinstance(event, RunFinished):
            self.end = event if event.state in TrialState.__members__ else None
        elif isinstance(event, MetricsRecorded) and self.best in event.metrics:
            self.values[event.step] = event.metrics[self.best]


def missing_of(
    trials: Sequence[FrozenTrial], events: Iterable[Event], objectives: Sequence[str]
) -> dict[int, Missing]:
    """Return what the events know of trials and the trials lack, by number.

    Args:
        trials: Trials of the study, as far as they could be read.
        events: Events of the study, oldest first.
        objectives: Names of the study's objectives.
    """
    told: dict[int, _Told] = {}
    for event in events:
        if isinstance(event.number, int):
            told.setdefault(event.number, _Told(METRICS[objectives[0]].best)).take(event)
    known = {trial.number: trial for trial in trials}
    return {
        number: _missing(known[number], told[number], len(objectives))
        for number in known.keys() & told.keys()
    }


def _missing(trial: FrozenTrial, told: _Told, num_objectives: int) -> Missing:
    recorded = values_by_epoch(trial)
    values = {epoch: value for epoch, value in told.values.items() if epoch not in recorded}
    attributes = _attributes(trial, told)
    if num_objectives > 1:  # see `results.trials.record_value`
        attributes |= {f"{EPOCH_PREFIX}{epoch}": value for epoch, value in values.items()}
        values = {}
    return Missing(attributes, values, _end(trial, told, num_objectives))


def _attributes(trial: FrozenTrial, told: _Told) -> dict[str, Any]:
    known: dict[str, Any] = {}
    if told.start is not None and told.start.params:
        with suppress(ConfigError):  # a damaged event; the trial is then proposed again
            config = TrialConfig.from_mapping(nested(told.start.params))
            known = {CONFIG: json.dumps(config.to_mapping())} | _marks(told.start.tags)
    if told.end is not None:
        known[OUTCOME] = told.end.outcome
    return {name: value for name, value in known.items() if name not in trial.user_attrs}


def _marks(tags: Mapping[str, str]) -> dict[str, Any]:
    marks = {name: tags[f"drtune.{name}"] for name in MARKS if f"drtune.{name}" in tags}
    return {name: int(text) if name == START_POINT else text for name, text in marks.items()}


def _end(
    trial: FrozenTrial, told: _Told, num_objectives: int
) -> tuple[TrialState, list[float] | None, str] | None:
    """Return the end of a trial; None if it is known, or its values are not: it then resumes."""
    if told.end is None or trial.state.is_finished():
        return None
    state, values = TrialState[told.end.state], None
    if state == TrialState.COMPLETE:
        by_epoch = values_by_epoch(trial) | told.values
        objectives = list(dict(trial.user_attrs.get(OBJECTIVES, {})).values())
        best = [by_epoch[max(by_epoch)]] if by_epoch else []  # each epoch has the best so far
        values = objectives if num_objectives > 1 else best
        if len(values) != num_objectives:
            return None
    return state, values, datetime.fromtimestamp(told.end.time_ms / 1000, UTC).isoformat()
