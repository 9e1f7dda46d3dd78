"""Build the events of a trial from its records."""

from __future__ import annotations

from optuna.trial import FrozenTrial

from drtune_ray.results.trials import FINALIST, OUTCOME, REFERENCE, START_POINT, mapping_of
from drtune_ray.tracking.events import MetricsRecorded, RunFinished, RunStarted
from drtune_ray.training.reports import EpochRecord
from drtune_ray.values import flattened

MARKS = (REFERENCE, FINALIST, START_POINT)


def run_started(trial: FrozenTrial) -> RunStarted:
    """Return the event of a trial's start."""
    marks = {key: str(trial.user_attrs[key]) for key in MARKS if key in trial.user_attrs}
    name = f"trial-{trial.number:04d}" + (f"-{marks[REFERENCE]}" if REFERENCE in marks else "")
    name += "-finalist" if FINALIST in marks else ""
    tags = {f"drtune.{key}": value for key, value in marks.items()}
    return RunStarted(trial.number, name, flattened(mapping_of(trial)), tags)


def epoch_event(number: int | None, record: EpochRecord) -> MetricsRecorded:
    """Return the event of an epoch's end."""
    return MetricsRecorded(number, record.epoch, record.metrics, record.time_ms)


def run_finished(trial: FrozenTrial) -> RunFinished:
    """Return the event of a trial's end as recorded by Optuna, the same at every call."""
    ended = trial.datetime_complete
    return RunFinished(
        trial.number,
        trial.state.name,
        trial.user_attrs.get(OUTCOME, ""),
        {},
        {},
        int(ended.timestamp() * 1000) if ended else 0,
    )
