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
EPOCH_PREFIX = "epoch:"
EPOCH_NAME = re.compile(rf"{EPOCH_PREFIX}\d+")
RESULT_STATES = (TrialState.COMPLETE, TrialState.PRUNED)


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
        best_val_accuracy: Best validation accuracy so far, 0 to 1; None before the first epoch.
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
    best_val_accuracy: float | None
    num_epochs: int
    seconds: float | None
    config: dict[str, Any]
    finalist: str | None = None
    objectives: dict[str, float] = field(default_factory=dict)
    best_epoch: int | None = None

    @property
    def is_final(self) -> bool:
        """Whether the trial repeats a finalist on a new seed."""
        return self.finalist is not None

    @property
    def label(self) -> str:
        """Short name for messages."""
        what = self.reference or self.finalist
        return f"{self.number}" + (f" ({what})" if what else "")


def write_trials(trials: list[TrialSummary], path: Path) -> None:
    """Write a Parquet table with one row per trial and configuration values as text columns."""
    rows = []
    for trial in trials:
        values = {key: json.dumps(value) for key, value in flattened(trial.config).items()}
        texts = {"config": json.dumps(trial.config), "objectives": json.dumps(trial.objectives)}
        rows.append(vars(trial) | texts | values)
    schema = pa.schema(
        [
            ("number", pa.int64()),
            ("state", pa.string()),
            ("outcome", pa.string()),
            ("reference", pa.string()),
            ("finalist", pa.string()),
            ("best_val_accuracy", pa.float64()),
            ("num_epochs", pa.int64()),
            ("best_epoch", pa.int64()),
            ("seconds", pa.float64()),
        ]
    )
    text_columns = sorted({key for row in rows for key in row} - set(schema.names))
    for name in text_columns:
        schema = schema.append(pa.field(name, pa.string()))
    table = pa.Table.from_pylist(rows, schema=schema)
    atomic_write(path, partial(pq.write_table, table), is_durable=False)


def best_trial(trials: Sequence[TrialSummary]) -> TrialSummary:
    """Return the search's completed trial with the best validation accuracy, the first of equals.

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
    return max(completed, key=lambda t: (t.best_val_accuracy or 0.0, -t.number))


def best_first(trials: Iterable[TrialSummary]) -> list[TrialSummary]:
    """Return the completed trials by best validation accuracy, best first."""
    completed = (t for t in trials if t.state == TrialState.COMPLETE.name)
    return sorted(completed, key=lambda t: (-(t.best_val_accuracy or 0.0), t.number))


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
    """Record the best validation accuracy so far for an epoch.

    Optuna accepts no intermediate values in a study with several objectives, so a user attribute
    holds them there.
    """
    if len(trial.study.directions) == 1:
        trial.report(value, epoch)
    else:
        trial.set_user_attr(f"{EPOCH_PREFIX}{epoch}", value)


def values_by_epoch(trial: FrozenTrial) -> dict[int, float]:
    """Return the best validation accuracy so far, 0 to 1, by epoch from 1."""
    attributes = trial.user_attrs.items()
    recorded = {key: value for key, value in attributes if EPOCH_NAME.fullmatch(key)}
    return trial.intermediate_values | {
        int(key.removeprefix(EPOCH_PREFIX)): float(value) for key, value in recorded.items()
    }


def best_value(trial: FrozenTrial) -> float:
    """Return the best validation accuracy so far, 0 to 1; minus infinity before epoch 1."""
    return max(values_by_epoch(trial).values(), default=-math.inf)


def best_epoch(trial: FrozenTrial) -> int | None:
    """Return the first epoch with the best validation accuracy; None before epoch 1."""
    values = values_by_epoch(trial)
    return max(values, key=lambda epoch: (values[epoch], -epoch), default=None)


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
        best if math.isfinite(best) else None,
        num_epochs(trial),
        duration,
        mapping_of(trial),
        trial.user_attrs.get(FINALIST),
        dict(trial.user_attrs.get(OBJECTIVES, {})),
        best_epoch(trial),
    )
