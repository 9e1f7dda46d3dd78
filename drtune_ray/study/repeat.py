"""Repeating one trial of a study, with its images and its seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState

from drtune_ray.config.metric import Metric
from drtune_ray.config.section import validated
from drtune_ray.config.study import STUDY, ResourcesConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.results.trials import TrialSummary, config_of, summaries
from drtune_ray.storage.record import find_study, read_record
from drtune_ray.storage.stored_trials import stored_trials

# Relative difference of two equal figures; accuracies that differ, differ by one image at least.
SAME = 1e-9


@dataclass(frozen=True)
class Original:
    """A trial that is to be repeated.

    Attributes:
        study: Name of its study.
        number: Its number.
        storage: Folder of the studies, which has its splits and tables.
        config: Its configuration, up to the epoch at which it ended.
        resources: Resources of its workers.
        metric: Metric that chose its best epoch.
        value: Best value of that metric.
    """

    study: str
    number: int
    storage: str
    config: TrialConfig
    resources: ResourcesConfig
    metric: Metric
    value: float

    @property
    def name(self) -> str:
        """Default name of the repetition."""
        return f"{self.study}-trial-{self.number}"

    def came_again(self, value: float) -> bool:
        """Return whether a repetition has the same value of the metric."""
        return math.isclose(value, self.value, rel_tol=SAME)


def original_trial(
    reference: str, storage: str, given: Mapping[str, Any], assignments: tuple[str, ...]
) -> Original:
    """Return a trial to repeat.

    Args:
        reference: ``STUDY:NUMBER``.
        storage: Folder of the studies.
        given: Further arguments, by name; those with a value are refused.
        assignments: Strings ``path=value``, refused as well.

    Raises:
        ConfigError: If there is no such trial, it has no result, or settings are given.
    """
    others = [name for name, value in given.items() if value is not None]
    if others or assignments:
        named = ", ".join([*others, *(f"--set {text}" for text in assignments)])
        raise ConfigError(f"--from repeats a trial as it was: leave out {named}")
    name, _, number = reference.rpartition(":")
    if not name or not number.isdigit():
        raise ConfigError(f"--from {reference!r} is not valid: write it STUDY:NUMBER")
    record = read_record(find_study(name, storage))
    trials = summaries(stored_trials(record)) if record.kind == STUDY else ()
    trial = next((one for one in trials if one.number == int(number)), None)
    if trial is None or trial.best_value is None:
        there = [one.number for one in trials if one.best_value is not None]
        raise ConfigError(
            f"{record.folder.name} has no trial {number} with a result: it has {there}"
        )
    resources = validated(ResourcesConfig, record.config["resources"], "resources.")
    return Original(
        record.folder.name,
        trial.number,
        str(record.folder.parent),
        _as_it_ended(trial),
        resources,
        trial.metric,
        trial.best_value,
    )


def _as_it_ended(trial: TrialSummary) -> TrialConfig:
    """Return the configuration of a trial, which ends where a scheduler stopped it."""
    config = config_of(trial)
    if trial.state == TrialState.COMPLETE.name:
        return config
    return config.with_values({"training.stop_epoch": trial.num_epochs})
