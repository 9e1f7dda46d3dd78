"""The trials of a study as a table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drtune_ray.config import flattened


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
