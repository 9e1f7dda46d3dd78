"""The trials of a study as a table."""

from __future__ import annotations

import json
import math
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

# User attributes of an Optuna trial. What it is beside a sampled one:
REFERENCE, FINALIST, START_POINT = "reference", "finalist", "start_point"
# Why it was never run; and the trial of another study whose result it is.
NOT_TRAINED, WARM_START = "not_trained", "warm_start"
DUPLICATE = "duplicate of trial"  # why one was not trained
CONFIG, OUTCOME, OBJECTIVES = "config", "outcome", "objectives"
EPOCH_PREFIX = "epoch:"
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
    """One trial.

    Attributes:
        number: Optuna's.
        state: Optuna's word: RUNNING, COMPLETE, PRUNED, FAIL.
        outcome: Why it ended.
        reference: Name of the reference trial it is, or None.
        best_val_accuracy: Best of its epochs so far, 0 to 1; None before the first.
        num_epochs: Epochs it finished.
        seconds: From its start to its end.
        config: The resolved trial configuration.
        finalist: Which finalist it repeats on another seed, or None.
        objectives: Values at its best epoch by name, where the study has several.
        best_epoch: From 1; None before the first.
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
        """Whether it repeats a finalist on a new seed and is no trial of the search."""
        return self.finalist is not None

    @property
    def label(self) -> str:
        """Short name for people."""
        what = self.reference or self.finalist
        return f"{self.number}" + (f" ({what})" if what else "")


def write_trials(trials: list[TrialSummary], path: Path) -> None:
    """Write a Parquet table: one row a trial, configuration values as text columns."""
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
    """The completed trial of the search with the best validation accuracy; of equals the first.

    Raises:
        NoTrialCompleted: If there is none.
    """
    trials = [trial for trial in trials if not trial.is_final]
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE.name]
    if not completed:
        outcomes = sorted({trial.outcome for trial in trials})
        has_failed = any(trial.state == TrialState.FAIL.name for trial in trials)
        advice = (
            "mend what failed (the tag drtune.error of the trials in MLflow says what) and repeat "
            "the command"
            if has_failed
            else "lower the learning rates of the search space"
        )
        raise NoTrialCompleted(
            f"none of {len(trials)} trials completed ({', '.join(outcomes)}): {advice}"
        )
    return max(completed, key=lambda t: (t.best_val_accuracy or 0.0, -t.number))


def best_first(trials: Iterable[TrialSummary]) -> list[TrialSummary]:
    """The completed trials by their best validation accuracy; of equals the first one first."""
    completed = (t for t in trials if t.state == TrialState.COMPLETE.name)
    return sorted(completed, key=lambda t: (-(t.best_val_accuracy or 0.0), t.number))


def is_trained(trial: FrozenTrial) -> bool:
    """Whether a trial of Optuna's is one that this study runs, ran, or will run."""
    attributes = trial.user_attrs
    return CONFIG in attributes and not {NOT_TRAINED, WARM_START} & attributes.keys()


def is_final(trial: FrozenTrial) -> bool:
    """Whether a trial of Optuna's repeats a finalist on a new seed."""
    return FINALIST in trial.user_attrs


def is_searched(trial: FrozenTrial) -> bool:
    """Whether it is such a trial of the search, and no repetition of a finalist."""
    return is_trained(trial) and not is_final(trial)


def record_value(trial: Trial, epoch: int, value: float) -> None:
    """Record the best validation accuracy so far, by epoch.

    Of a study with several objectives Optuna takes no intermediate values: a user attribute does.
    """
    if len(trial.study.directions) == 1:
        trial.report(value, epoch)
    else:
        trial.set_user_attr(f"{EPOCH_PREFIX}{epoch}", value)


def values_by_epoch(trial: FrozenTrial) -> dict[int, float]:
    """Best validation accuracy so far, 0 to 1, after each epoch from 1."""
    attributes = trial.user_attrs.items()
    recorded = {key: value for key, value in attributes if key.startswith(EPOCH_PREFIX)}
    return trial.intermediate_values | {
        int(key.removeprefix(EPOCH_PREFIX)): float(value) for key, value in recorded.items()
    }


def best_value(trial: FrozenTrial) -> float:
    """Best validation accuracy so far, 0 to 1; minus infinity before the first epoch."""
    return max(values_by_epoch(trial).values(), default=-math.inf)


def best_epoch(trial: FrozenTrial) -> int | None:
    """The first epoch with the best validation accuracy; None before the first epoch."""
    values = values_by_epoch(trial)
    return max(values, key=lambda epoch: (values[epoch], -epoch), default=None)


def num_epochs(trial: FrozenTrial) -> int:
    """Epochs that were finished."""
    return max(values_by_epoch(trial), default=0)


def summaries(trials: Iterable[FrozenTrial]) -> tuple[TrialSummary, ...]:
    """The trials that this study runs or ran, by number."""
    return tuple(summary(trial) for trial in trials if is_trained(trial))


def summary(trial: FrozenTrial) -> TrialSummary:
    """A row of the results from what Optuna holds."""
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
