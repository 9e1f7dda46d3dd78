"""Build the events of a trial from its records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from drtune_ray.config.metric import metric_of
from drtune_ray.results.trials import (
    FINALIST,
    HOST,
    OUTCOME,
    REFERENCE,
    START_POINT,
    best_value,
    config_of,
    is_final,
    is_trained,
    mapping_of,
    values_by_epoch,
)
from drtune_ray.results.used_settings import resolved_settings, unused_settings
from drtune_ray.space.parameters import path_of
from drtune_ray.tracking.events import MetricsRecorded, RunFinished, RunStarted
from drtune_ray.training.reports import EpochRecord
from drtune_ray.values import flattened

MARKS = (REFERENCE, FINALIST, START_POINT)
# Names of settings in the names of runs; others are named by the last part of their path.
SHORT = {
    "method.regularization_weight": "lambda",
    "method.bank_size": "K",
    "method.head_lr_multiplier": "head",
    "method.calibration.rotation": "rot",
    "optim.backbone_lr": "lr",
    "optim.weight_decay": "wd",
    "training.batch_size": "B",
}
MAX_NAME_LENGTH = 80


def run_started(trial: FrozenTrial) -> RunStarted:
    """Return the event of a trial's start."""
    config = config_of(trial)
    marks = {key: str(trial.user_attrs[key]) for key in MARKS if key in trial.user_attrs}
    tags = {f"drtune.{key}": value for key, value in marks.items()}
    tags |= {"drtune.seed": str(config.seed), "drtune.workers": str(config.training.workers)}
    unused = unused_settings(config)
    return RunStarted(
        trial.number,
        _run_name(trial, unused),
        flattened(mapping_of(trial)),
        tags,
        unused=unused,
        resolved=resolved_settings(config),
    )


def _run_name(trial: FrozenTrial, unused: list[str]) -> str:
    """Return a name for people, such as ``t007 lambda=0.8 K=512 rot``."""
    number = f"t{trial.number:03d}"
    if FINALIST in trial.user_attrs:
        return f"{number} final of {trial.user_attrs[FINALIST]}"
    if REFERENCE in trial.user_attrs:
        return f"{number} {trial.user_attrs[REFERENCE]}"
    values = flattened(mapping_of(trial))
    used = (path for path in map(path_of, trial.distributions) if path not in unused)
    parts = [_setting(path, values[path]) for path in used if path in values]
    return " ".join([number, *parts])[:MAX_NAME_LENGTH]


def _setting(path: str, value: Any) -> str:
    name = SHORT.get(path, path.rpartition(".")[2])
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    return f"{name}={value:.2g}" if isinstance(value, float) else f"{name}={value}"


def epoch_event(number: int | None, record: EpochRecord) -> MetricsRecorded:
    """Return the event of an epoch's end."""
    return MetricsRecorded(number, record.epoch, record.metrics, record.time_ms)


def run_finished(trial: FrozenTrial) -> RunFinished:
    """Return the event of a trial's end as recorded by Optuna, the same at every call."""
    host = trial.user_attrs.get(HOST)
    return RunFinished(
        trial.number,
        trial.state.name,
        trial.user_attrs.get(OUTCOME, ""),
        {},
        {"drtune.host": str(host)} if host else {},
        _end_ms(trial),
    )


def search_history(trials: Iterable[FrozenTrial]) -> Iterator[MetricsRecorded]:
    """Yield metrics of the study for each trial of the search that ended, in order of their ends.

    MLflow draws them as charts over the number of trials. They are the same at every call.
    """
    ended = [
        trial
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        and values_by_epoch(trial)
        and is_trained(trial)
        and not is_final(trial)
    ]
    best: float | None = None
    for step, trial in enumerate(sorted(ended, key=lambda t: (_end_ms(t), t.number)), 1):
        value, metric = best_value(trial), metric_of(mapping_of(trial))
        assert value is not None  # a trial without values is left out
        if trial.state == TrialState.COMPLETE:
            best = value if best is None else max(best, value, key=metric.score)
        metrics = {f"search_trial_{metric.measure}": value}
        if best is not None:
            metrics[f"search_best_{metric.measure}"] = best
        yield MetricsRecorded(None, step, metrics, _end_ms(trial))


def _end_ms(trial: FrozenTrial) -> int:
    ended = trial.datetime_complete
    return int(ended.timestamp() * 1000) if ended else 0
