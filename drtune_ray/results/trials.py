"""The trials of a study as a table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from optuna.trial import FrozenTrial, Trial, TrialState

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric, metric_of
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import NoTrialCompleted
from drtune_ray.folders import atomic_write
from drtune_ray.values import flattened

# User attributes of an Optuna trial. Kinds of trials that were not sampled:
REFERENCE, FINALIST, START_POINT = "reference", "finalist", "start_point"
# Reason why a trial was not trained; the trial of another study whose result it copies.
NOT_TRAINED, WARM_START = "not_trained", "warm_start"
DUPLICATE = "duplicate of trial"  # a reason for `NOT_TRAINED`
CONFIG, OUTCOME, OBJECTIVES = "config", "outcome", "objectives"
HOST = "host"  # where the trial ended
EPOCH_PREFIX = "epoch:"
EPOCH_NAME = re.compile(rf"{EPOCH_PREFIX}\d+")
RESULT_STATES = (TrialState.COMPLETE, TrialState.PRUNED)
# Columns of a table of trials that are no settings.
TRIAL_COLUMNS = {
    "number": pa.int64(),
    "state": pa.string(),
    "outcome": pa.string(),
    "reference": pa.string(),
    "finalist": pa.string(),
    "num_epochs": pa.int64(),
    "best_epoch": pa.int64(),
    "seconds": pa.float64(),
}
SETTING_TYPES: tuple[tuple[set[type], pa.DataType], ...] = (
    ({bool}, pa.bool_()),
    ({int}, pa.int64()),
    ({int, float}, pa.float64()),
)


def describe(trial: Trial, config: TrialConfig) -> None:
    """Record the configuration of a trial in its Optuna study."""
    trial.set_user_attr(CONFIG, json.dumps(config.to_mapping()))


def config_of(trial: Trial | FrozenTrial | TrialSummary) -> TrialConfig:
    """Return the configuration of a trial, of an Optuna study or of its results."""
    values = trial.config if isinstance(trial, TrialSummary) else mapping_of(trial)
    return TrialConfig.from_mapping(values)


def mapping_of(trial: Trial | FrozenTrial) -> dict[str, Any]:
    """Return the recorded configuration of a trial of an Optuna study; empty if it has none."""
    values: dict[str, Any] = json.loads(trial.user_attrs.get(CONFIG, "{}"))
    return values


@dataclass(frozen=True)
class TrialSummary:
    """Summary of a trial.

    Attributes:
        number: Optuna's number of the trial.
        state: Optuna's state: RUNNING, COMPLETE, PRUNED, FAIL.
        outcome: Reason why it ended.
        reference: Name of the reference trial, or None.
        best_value: Best value so far of the metric that chooses; None before the first epoch.
        num_epochs: Number of completed epochs.
        seconds: Duration in seconds; None while it runs.
        config: The resolved trial configuration.
        finalist: Name of the finalist that it repeats on another seed, or None.
        objectives: Values at the best epoch by name; empty for a single objective.
        best_epoch: Best epoch, from 1; None before the first.
    """

    number: int
    state: str
    outcome: str
    reference: str | None
    best_value: float | None
    num_epochs: int
    seconds: float | None
    config: dict[str, Any]
    finalist: str | None = None
    objectives: dict[str, float] = field(default_factory=dict)
    best_epoch: int | None = None

    @property
    def metric(self) -> Metric:
        """Metric that chooses its best epoch, and among trials."""
        return metric_of(self.config)

    @property
    def score(self) -> float:
        """`best_value` as a number that is the higher the better; minus infinity without one."""
        return -math.inf if self.best_value is None else self.metric.score(self.best_value)

    @property
    def best_val_accuracy(self) -> float | None:
        """Best validation accuracy, 0 to 1; None where another metric chooses."""
        return self.best_value if self.metric is METRICS[DEFAULT_METRIC] else None

    def to_mapping(self) -> dict[str, Any]:
        """Return the summary as plain values; the best value also under its metric's name."""
        return {**vars(self), "metric": self.metric.measure, self.metric.best: self.best_value}

    @property
    def is_final(self) -> bool:
        """Whether the trial repeats a finalist on a new seed."""
        return self.finalist is not None

    @property
    def label(self) -> str:
        """Short name for messages."""
        what = self.reference or self.finalist
        return f"{self.number}" + (f" ({what})" if what else "")


def trials_table(trials: Sequence[TrialSummary]) -> pa.Table:
    """Return a table with one row per trial; docs/tables.md describes the columns.

    Every setting has a column of its own, by dotted path: of numbers or truth values where all
    trials have such values, else of JSON text.
    """
    settings = [flattened(trial.config) for trial in trials]
    columns: dict[str, pa.Array] = {}
    for name, kind in TRIAL_COLUMNS.items():
        columns[name] = pa.array([getattr(trial, name) for trial in trials], kind)
    for name in sorted({trial.metric.best for trial in trials}):  # one in the trials of a study
        values = [trial.best_value if trial.metric.best == name else None for trial in trials]
        columns[name] = pa.array(values, pa.float64())
    for path in sorted({path for values in settings for path in values}):
        columns[path] = setting_column([values.get(path) for values in settings])
    for name in ("objectives", "config"):
        texts = [json.dumps(getattr(trial, name)) for trial in trials]
        columns[name] = pa.array(texts, pa.string())
    return pa.table(columns)


def setting_column(values: Sequence[Any]) -> pa.Array:
    """Return the values of a setting as a column of the narrowest type that holds all of them."""
    kinds = {type(value) for value in values if value is not None}
    for allowed, kind in SETTING_TYPES:
        if kinds and kinds <= allowed:
            return pa.array(values, kind)
    texts = [value if value is None else json.dumps(value) for value in values]
    return pa.array(texts, pa.string())


def write_trials(trials: Sequence[TrialSummary], path: Path) -> None:
    """Write the table of the trials as Parquet."""
    atomic_write(path, partial(pq.write_table, trials_table(trials)), is_durable=False)


def best_trial(trials: Sequence[TrialSummary]) -> TrialSummary:
    """Return the search's completed trial with the best value, the first of equals.

    Raises:
        NoTrialCompleted: If there is none.
    """
    trials = [trial for trial in trials if not trial.is_final]
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE.name]
    if not completed:
        outcomes = sorted({trial.outcome for trial in trials})
        has_failed = any(trial.state == TrialState.FAIL.name for trial in trials)
        advice = (
            "fix the cause (see the tag drtune.error of the trials in MLflow) and repeat the "
            "command"
            if has_failed
            else "lower the learning rates of the search space"
        )
        raise NoTrialCompleted(
            f"none of {len(trials)} trials completed ({', '.join(outcomes)}): {advice}"
        )
    return max(completed, key=lambda t: (t.score, -t.number))


def best_first(trials: Iterable[TrialSummary]) -> list[TrialSummary]:
    """Return the completed trials by their best values, best first."""
    completed = (t for t in trials if t.state == TrialState.COMPLETE.name)
    return sorted(completed, key=lambda t: (-t.score, t.number))


def is_trained(trial: FrozenTrial) -> bool:
    """Return whether an Optuna trial is one that this study has run, runs or will run."""
    attributes = trial.user_attrs
    return CONFIG in attributes and not {NOT_TRAINED, WARM_START} & attributes.keys()


def is_final(trial: FrozenTrial) -> bool:
    """Return whether an Optuna trial repeats a finalist on a new seed."""
    return FINALIST in trial.user_attrs


def is_searched(trial: FrozenTrial) -> bool:
    """Return whether a trial is trained by the search, rather than as a finalist."""
    return is_trained(trial) and not is_final(trial)


def record_value(trial: Trial, epoch: int, value: float) -> None:
    """Record the best value so far for an epoch.

    Optuna accepts no intermediate values in a study with several objectives, so a user attribute
    holds them there.
    """
    if len(trial.study.directions) == 1:
        trial.report(value, epoch)
    else:
        trial.set_user_attr(f"{EPOCH_PREFIX}{epoch}", value)


def values_by_epoch(trial: FrozenTrial) -> dict[int, float]:
    """Return the best value so far of the metric that chooses, by epoch from 1."""
    attributes = trial.user_attrs.items()
    recorded = {key: value for key, value in attributes if EPOCH_NAME.fullmatch(key)}
    return trial.intermediate_values | {
        int(key.removeprefix(EPOCH_PREFIX)): float(value) for key, value in recorded.items()
    }


def best_value(trial: FrozenTrial) -> float | None:
    """Return the best value so far, which the last epoch has; None before epoch 1."""
    values = values_by_epoch(trial)
    return values[max(values)] if values else None


def best_epoch(trial: FrozenTrial) -> int | None:
    """Return the first epoch with the best value; None before epoch 1."""
    values, best = values_by_epoch(trial), best_value(trial)
    return min((epoch for epoch, value in values.items() if value == best), default=None)


def num_epochs(trial: FrozenTrial) -> int:
    """Return the number of completed epochs."""
    return max(values_by_epoch(trial), default=0)


def summaries(trials: Iterable[FrozenTrial]) -> tuple[TrialSummary, ...]:
    """Return summaries of the trials that this study runs or has run, by number."""
    return tuple(summary(trial) for trial in trials if is_trained(trial))


def summary(trial: FrozenTrial) -> TrialSummary:
    """Return the summary of an Optuna trial."""
    duration = trial.duration.total_seconds() if trial.duration else None
    best = best_value(trial)
    return TrialSummary(
        trial.number,
        trial.state.name,
        trial.user_attrs.get(OUTCOME, ""),
        trial.user_attrs.get(REFERENCE),
        best if best is not None and math.isfinite(best) else None,
        num_epochs(trial),
        duration,
        mapping_of(trial),
        trial.user_attrs.get(FINALIST),
        dict(trial.user_attrs.get(OBJECTIVES, {})),
        best_epoch(trial),
    )
