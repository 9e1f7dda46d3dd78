"""The searched settings of the trials as numbers or words, and how much each one mattered."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.importance import (
    BaseImportanceEvaluator,
    FanovaImportanceEvaluator,
    PedAnovaImportanceEvaluator,
    get_param_importances,
)
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.interpolate import griddata
from scipy.spatial import QhullError

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric
from drtune_ray.errors import ConfigError
from drtune_ray.results.events import SHORT
from drtune_ray.results.pareto import study_in_memory
from drtune_ray.results.trials import TrialSummary, config_of, is_searched
from drtune_ray.results.used_settings import resolved_settings, unused_settings
from drtune_ray.results.words import noun, short_names
from drtune_ray.space.parameters import path_of
from drtune_ray.values import flattened

logger = logging.getLogger(__name__)

LAMBDA, BANK_SIZE = "method.regularization_weight", "method.bank_size"
LEARNING_RATE = "optim.backbone_lr"
PED_ANOVA, FANOVA = "PED-ANOVA", "fANOVA"
MIN_TRIALS = 8  # completed ones, below which an importance says nothing
MIN_POINTS = 4  # of a contour
WIDE = 50.0  # largest over smallest value from which an axis is logarithmic
GRID = 40  # points of a contour along each axis
SAME_TRIALS = "Target and region quantiles select the same"  # then all are equal
FOREST_SEED, NUM_TREES = 0, 32

Value = int | float | str | None


@dataclass(frozen=True)
class Axis:
    """A searched setting.

    Attributes:
        path: Its dotted path.
        name: Its short name.
        is_log: Whether it varies over orders of magnitude.
        values: Value by the number of the trial: a number, or a word; None if the trial ignores
            the setting.
    """

    path: str
    name: str
    is_log: bool
    values: Mapping[int, Value]

    @cached_property
    def is_numeric(self) -> bool:
        """Whether every value is a number."""
        return all(isinstance(v, int | float) for v in self.values.values() if v is not None)

    @cached_property
    def words(self) -> list[str]:
        """All values as words, in the order of first use."""
        return list(dict.fromkeys(str(v) for v in self.values.values() if v is not None))

    def number(self, trial: int) -> float | None:
        """Return a trial's value; for words its position among `words`."""
        value = self.values.get(trial)
        if value is None:
            return None
        return float(value) if self.is_numeric else float(self.words.index(str(value)))


@dataclass(frozen=True)
class Importances:
    """Share of the variation of the metric that each setting explains, largest first.

    Attributes:
        shares: Shares by evaluator and short name of the setting; they sum to 1.
        num_trials: Number of completed trials that they come from.
        left_out: Short names of settings that not all of these trials have.
        note: Why there are none; empty otherwise.
    """

    shares: Mapping[str, Mapping[str, float]]
    num_trials: int
    left_out: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Contour:
    """A metric over two settings, interpolated between the trials.

    Attributes:
        x: Values of the first setting (GRID).
        y: Values of the second one (GRID).
        z: Value by y and x; None outside the trials.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    z: tuple[tuple[float | None, ...], ...]


def searched_paths(frozen: Sequence[FrozenTrial]) -> tuple[str, ...]:
    """Return the paths of the settings that were sampled, in the order of first use."""
    names = (name for trial in frozen if is_searched(trial) for name in trial.distributions)
    return tuple(dict.fromkeys(map(path_of, names)))


def read_axes(frozen: Sequence[FrozenTrial], trials: Sequence[TrialSummary]) -> tuple[Axis, ...]:
    """Return the searched settings with their values in the trials of the search."""
    paths = searched_paths(frozen)
    names = short_names(paths) | {path: SHORT[path] for path in paths if path in SHORT}
    by_trial = {trial.number: setting_values(trial) for trial in trials if not trial.is_final}
    logs = {
        path_of(name)
        for trial in frozen
        for name, distribution in trial.distributions.items()
        if getattr(distribution, "log", False)
    }
    return tuple(
        _axis(path, names[path], path in logs, {n: v.get(path) for n, v in by_trial.items()})
        for path in paths
    )


def _axis(path: str, name: str, is_log: bool, values: Mapping[int, Any]) -> Axis:
    plain = {number: _plain(value) for number, value in values.items()}
    numbers = [value for value in plain.values() if isinstance(value, int | float)]
    can_be = bool(numbers) and min(numbers) > 0 and len(numbers) == _num_known(plain)
    is_wide = can_be and max(numbers) / min(numbers) >= WIDE
    return Axis(path, name, can_be and (is_log or is_wide), plain)


def _num_known(values: Mapping[int, Value]) -> int:
    return sum(value is not None for value in values.values())


def _plain(value: Any) -> Value:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return json.dumps(value)


def setting_values(trial: TrialSummary) -> dict[str, Any]:
    """Return the settings that a trial used, by path, with numbers for named values."""
    values = flattened(trial.config)
    try:
        config = config_of(trial)
    except ConfigError:  # of another version
        return values
    unused = set(unused_settings(config))
    values |= resolved_settings(config)
    return {path: value for path, value in values.items() if path not in unused}


# ---- importance


def importances(frozen: Sequence[FrozenTrial], axes: Sequence[Axis], metric: Metric) -> Importances:
    """Return the importance of the settings by Optuna's PED-ANOVA and fANOVA.

    Both take the completed trials that were sampled; a trial that was stopped early has no final
    value. Settings that some of these trials lack cannot be compared and are left out.
    """
    sampled = [
        trial
        for trial in frozen
        if is_searched(trial) and trial.state == TrialState.COMPLETE and trial.distributions
    ]
    names = {axis.path: axis.name for axis in axes}
    if len(sampled) < MIN_TRIALS:
        return Importances({}, len(sampled), (), f"fewer than {MIN_TRIALS} completed trials")
    common = set.intersection(*(set(trial.distributions) for trial in sampled))
    alone = study_in_memory([metric.direction])  # of the first objective, the metric
    for trial in sampled:
        params, distributions = trial.params, trial.distributions
        value = trial.values[0]
        alone.add_trial(create_trial(value=value, params=params, distributions=distributions))
    left_out = tuple(n for path, n in names.items() if path not in map(path_of, common))
    shares = {}
    evaluators: dict[str, BaseImportanceEvaluator] = {
        PED_ANOVA: PedAnovaImportanceEvaluator(),
        FANOVA: FanovaImportanceEvaluator(n_trees=NUM_TREES, seed=FOREST_SEED),
    }
    for name, evaluator in evaluators.items():
        found = _importance(alone, evaluator, sorted(common))
        shares[name] = {names[path_of(key)]: share for key, share in found.items()}
    shares = {name: found for name, found in shares.items() if any(found.values())}
    if not shares:
        return Importances({}, len(sampled), left_out, _equal(metric))
    return Importances(shares, len(sampled), left_out)


def _equal(metric: Metric) -> str:
    if metric is METRICS[DEFAULT_METRIC]:
        return "all accuracies are equal"
    return f"all completed trials have the same {noun(metric)}"


def _importance(
    study: optuna.Study, evaluator: BaseImportanceEvaluator, names: list[str]
) -> dict[str, float]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", SAME_TRIALS)
            return get_param_importances(study, evaluator=evaluator, params=names)
    except (ValueError, RuntimeError, UserWarning) as error:
        logger.info("no importance: %s", error)
        return {}


# ---- contour


def contour(x: Axis, y: Axis, values: Mapping[int, float]) -> Contour | None:
    """Interpolate a metric linearly between the trials; None if they span no area."""
    numbers = [n for n in values if x.number(n) is not None and y.number(n) is not None]
    if len(numbers) < MIN_POINTS:
        return None
    columns = [_scaled(axis, [axis.number(n) or 0.0 for n in numbers]) for axis in (x, y)]
    points = np.stack(columns, 1)
    low, high = points.min(0), points.max(0)
    if not (high > low).all():
        return None
    steps = np.linspace(0.0, 1.0, GRID)
    grid = np.stack(np.meshgrid(steps, steps), -1)
    try:
        z = griddata((points - low) / (high - low), [values[n] for n in numbers], grid)
    except QhullError:  # all on one line
        return None
    ticks = low + steps[:, None] * (high - low)
    return Contour(
        _unscaled(x, ticks[:, 0]),
        _unscaled(y, ticks[:, 1]),
        tuple(tuple(None if np.isnan(v) else float(v) for v in row) for row in z),
    )


def _scaled(axis: Axis, values: Sequence[float]) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    return np.log10(found) if axis.is_log else found


def _unscaled(axis: Axis, values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(v) for v in (10.0**values if axis.is_log else values))
