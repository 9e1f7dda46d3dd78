"""Trials of earlier studies that the sampler learns from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from drtune_ray.config.trial import TRIAL_NOT_DECIDING, TrialConfig
from drtune_ray.results import trials
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.storage.fingerprint import DATA_DIGEST, NUMERICS, WEIGHTS_DIGEST
from drtune_ray.storage.record import Record
from drtune_ray.values import flattened

# A trial's accuracy is comparable only where these are the same.
COMPARED = (DATA_DIGEST, WEIGHTS_DIGEST, NUMERICS, "objectives")


def add_earlier_trials(
    study: optuna.Study,
    earlier: Sequence[tuple[Record, Sequence[FrozenTrial]]],
    deciding: Mapping[str, Any],
    space: SearchSpace,
    base: TrialConfig,
) -> tuple[str, ...]:
    """Add the trials of earlier studies to a study, once; they do not count as its own.

    Args:
        study: The study; receives copies that name their origin.
        earlier: Earlier studies, each with its trials.
        deciding: Values that decide the results of the present study.
        space: The present search space.
        base: The configuration that the space varies.

    Returns:
        A sentence for each earlier study: the number of its trials added, and why others were not.
    """
    known = {t.user_attrs.get(trials.WARM_START) for t in study.get_trials(deepcopy=False)}
    return tuple(
        _add(study, record, found, deciding, space, base, known) for record, found in earlier
    )


def _add(
    study: optuna.Study,
    record: Record,
    found: Iterable[FrozenTrial],
    deciding: Mapping[str, Any],
    space: SearchSpace,
    base: TrialConfig,
    known: set[Any],
) -> str:
    name = f"warm start from {record.folder.name!r}"
    differing = [key for key in COMPARED if record.deciding.get(key) != deciding.get(key)]
    if differing:
        return f"{name}: no trial is comparable, since it has other {' and '.join(differing)}"
    reasons: Counter[str] = Counter()
    num_added = 0
    for trial in found:
        if not trials.is_searched(trial) or trial.state not in trials.RESULT_STATES:
            continue
        config = _at_places_of(trials.config_of(trial), base)
        values = space.locate(config, base)
        if values is None:
            reasons[_why_outside(config, base, space)] += 1
            continue
        num_added += 1
        label = f"{record.study_id}:{trial.number}"
        if label not in known:
            study.add_trial(_copy(trial, label, values, space, base))
    left_out = "".join(f"; {count} left out: {reason}" for reason, count in reasons.most_common())
    return f"{name}: {num_added} trials{left_out}"


def _copy(
    trial: FrozenTrial,
    label: str,
    values: dict[str, Any],
    space: SearchSpace,
    base: TrialConfig,
) -> FrozenTrial:
    asked = optuna.trial.FixedTrial(values)
    space.suggest(asked, base)  # type: ignore[arg-type]  # FixedTrial has the same methods
    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values if trial.state == optuna.trial.TrialState.COMPLETE else None,
        params=values,
        distributions=asked.distributions,
        intermediate_values=trial.intermediate_values,
        user_attrs={trials.WARM_START: label, trials.CONFIG: trial.user_attrs[trials.CONFIG]},
        constraints=trial.constraints,
    )


def _at_places_of(config: TrialConfig, base: TrialConfig) -> TrialConfig:
    """Return the configuration with the present settings that only change places and speed."""
    there = flattened(base.to_mapping())
    return config.with_values({path: there[path] for path in TRIAL_NOT_DECIDING})


def _why_outside(config: TrialConfig, base: TrialConfig, space: SearchSpace) -> str:
    """Return which setting of an earlier trial the present study cannot have."""
    searched = {parameter.path: parameter for parameter in space.parameters}
    wanted, there = flattened(config.to_mapping()), flattened(base.to_mapping())
    for path, value in wanted.items():
        if path not in searched and value != there[path]:
            return f"{path}={value!r} is {there[path]!r} here"
        if path in searched and value != there[path] and not searched[path].holds(value):
            return f"{path}={value!r} is not in the search space"
    return "they lie outside of the search space"
