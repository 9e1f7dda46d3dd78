"""The epochs of a study's trials as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from optuna.trial import FrozenTrial

from drtune_ray.config.metric import metric_of
from drtune_ray.folders import atomic_write
from drtune_ray.results.trials import is_trained, mapping_of, values_by_epoch
from drtune_ray.tracking.events import Event, MetricsRecorded

TIME = pa.timestamp("ms", tz="UTC")


def epochs_table(trials: Sequence[FrozenTrial], events: Iterable[Event]) -> pa.Table:
    """Return a table with one row per epoch of a trial; docs/tables.md describes the columns.

    Args:
        trials: Trials of the Optuna study, which know the best value of every epoch.
        events: Events of the spool, which hold the other metrics; of a study that was brought back
            from artifacts some are missing.
    """
    known = {
        trial.number: (metric_of(mapping_of(trial)).best, values_by_epoch(trial))
        for trial in trials
        if is_trained(trial)
    }
    rows: dict[tuple[int, int], tuple[int | None, dict[str, float]]] = {
        (number, epoch): (None, {name: value})
        for number, (name, values) in known.items()
        for epoch, value in values.items()
    }
    for event in events:
        if isinstance(event, MetricsRecorded) and isinstance(event.number, int):
            if (event.number, event.step) in rows:
                rows[event.number, event.step] = (event.time_ms, event.metrics)
    ordered = sorted(rows.items())
    columns = {
        "number": pa.array([number for (number, _), _ in ordered], pa.int64()),
        "epoch": pa.array([epoch for (_, epoch), _ in ordered], pa.int64()),
        "time": pa.array([time_ms for _, (time_ms, _) in ordered], TIME),
    }
    for name in sorted({name for _, (_, metrics) in ordered for name in metrics}):
        values = [metrics.get(name) for _, (_, metrics) in ordered]
        columns[name] = pa.array(values, pa.float64())
    return pa.table(columns)


def write_epochs(trials: Sequence[FrozenTrial], events: Iterable[Event], path: Path) -> None:
    """Write the table of the epochs as Parquet."""
    table = epochs_table(trials, events)
    atomic_write(path, partial(pq.write_table, table), is_durable=False)
