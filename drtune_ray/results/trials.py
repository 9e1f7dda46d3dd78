"""The trials of a study as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from optuna.trial import FrozenTrial, TrialState

from drtune_ray.errors import NoTrialCompleted
from drtune_ray.values import flattened

# User attributes of an Optuna trial.
CONFIG, REFERENCE, OUTCOME = "config", "reference", "outcome"


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
    """

    number: int
    state: str
    outcome: str
    reference: str | None
    best_val_accuracy: float | None
    num_epochs: int
    seconds: float | None
    config: dict[str, Any]

    @property
    def label(self) -> str:
        """Short name for people."""
        return f"{self.number}" + (f" ({self.reference})" if self.reference else "")


def write_trials(trials: list[TrialSummary], path: Path) -> None:
    """Write a Parquet table: one row a trial, configuration values as text columns."""
    rows = []
    for trial in trials:
        values = {key: json.dumps(value) for key, value in flattened(trial.config).items()}
        rows.append({**vars(trial), "config": json.dumps(trial.config)} | values)
    schema = pa.schema(
        [
            ("number", pa.int64()),
            ("state", pa.string()),
            ("outcome", pa.string()),
            ("reference", pa.string()),
            ("best_val_accuracy", pa.float64()),
            ("num_epochs", pa.int64()),
            ("seconds", pa.float64()),
        ]
    )
    text_columns = sorted({key for row in rows for key in row} - set(schema.names))
    for name in text_columns:
        schema = schema.append(pa.field(name, pa.string()))
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
    temporary.replace(path)


def best_trial(trials: Sequence[TrialSummary]) -> TrialSummary:
    """The completed trial with the best validation accuracy; of equals the first.

    Raises:
        NoTrialCompleted: If there is none.
    """
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


def summary(trial: FrozenTrial) -> TrialSummary:
    """A row of the results from what Optuna holds."""
    duration = trial.duration.total_seconds() if trial.duration else None
    values = trial.intermediate_values.values()
    return TrialSummary(
        trial.number,
        trial.state.name,
        trial.user_attrs.get(OUTCOME, ""),
        trial.user_attrs.get(REFERENCE),
        max(values) if values else None,
        max(trial.intermediate_values, default=0),
        duration,
        json.loads(trial.user_attrs.get(CONFIG, "{}")),
    )
