"""Optuna's samplers by name, and a wrapper that shows them sampled trials only."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Container, Sequence
from itertools import takewhile
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from drtune_ray.config.sampler_options import SAMPLER_OPTIONS, SamplerOptions
from drtune_ray.config.section import validated
from drtune_ray.config.study import SamplerConfig, SamplerName
from drtune_ray.errors import ConfigError
from drtune_ray.results.trials import DUPLICATE, NOT_TRAINED
from drtune_ray.training.model import derived_seed

SAMPLERS: dict[SamplerName, Any] = {
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "cma_es": optuna.samplers.CmaEsSampler,
    "qmc": optuna.samplers.QMCSampler,
    "random": optuna.samplers.RandomSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "nsga3": optuna.samplers.NSGAIIISampler,
}
# A point of a sequence depends on all before it: the seed of the sequence must stay.
SEQUENCES = ("qmc",)
RANDOM_START = "n_startup_trials"
MAX_REPEATS = 10


def check_sampler(config: SamplerConfig) -> None:
    """Check the options, and build the sampler once.

    Raises:
        ConfigError: For an option that the sampler does not have or does not accept, or if its
            package is missing.
    """
    _options(config)
    if config.name == "cma_es" and importlib.util.find_spec("cmaes") is None:
        raise ConfigError("sampler.name=cma_es needs a package: pip install cmaes")
    try:
        build_sampler(config, 0, 0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sampler.options={config.options!r} are not valid: {error}") from None


def _options(config: SamplerConfig) -> SamplerOptions:
    what = f"option of the sampler {config.name}"
    return validated(SAMPLER_OPTIONS[config.name], config.options, "sampler.options.", what)


class SampledTrialsSampler(optuna.samplers.BaseSampler):
    """A sampler that sees sampled trials only, and does not repeat itself for ever.

    Reference trials outside the space, and finalists, have no parameters. Optuna's TPE counts them
    among the best tenth all the same, which then holds nothing to learn from; GP, CMA-ES, QMC and
    the genetic samplers model the parameters that all trials have in common, and would silently
    draw everything at random (Optuna 5.0).

    A repeated point teaches a sampler nothing, and where parameters have few values it is proposed
    again and again, by GP for ever. After `MAX_REPEATS` repeats in a row points are drawn at
    random, so that a space with points left does not look exhausted.

    Args:
        sampler: Sampler whose proposals are used.
        random: Sampler that draws at random.
    """

    def __init__(
        self, sampler: optuna.samplers.BaseSampler, random: optuna.samplers.BaseSampler
    ) -> None:
        self._sampler, self._random = sampler, random
        self._repeats: dict[int, int] = {}  # repeats in a row before a trial, by its number

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that are drawn together."""
        return self._of(study, trial).infer_relative_search_space(_sampled_alone(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the parameters that are drawn together."""
        sampler = self._of(study, trial)
        return sampler.sample_relative(_sampled_alone(study), trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one of the other parameters."""
        return self._of(study, trial).sample_independent(
            _sampled_alone(study), trial, param_name, param_distribution
        )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Pass on what Optuna calls before a trial."""
        self._of(study, trial).before_trial(_sampled_alone(study), trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Pass on what Optuna calls after a trial."""
        self._of(study, trial).after_trial(_sampled_alone(study), trial, state, values)

    def _of(self, study: optuna.Study, trial: FrozenTrial) -> optuna.samplers.BaseSampler:
        """Return a trial's sampler, which depends on earlier trials: the same after a resume."""
        if trial.number not in self._repeats:
            before = study.get_trials(deepcopy=False)[: trial.number]
            self._repeats[trial.number] = sum(1 for _ in takewhile(_is_repeat, reversed(before)))
        return self._random if self._repeats[trial.number] >= MAX_REPEATS else self._sampler


def _is_repeat(trial: FrozenTrial) -> bool:
    return str(trial.user_attrs.get(NOT_TRAINED, "")).startswith(DUPLICATE)


class _SampledAlone(optuna.Study):
    """A study without the trials that have no parameters; a view, which is never stored."""

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, states, use_cache)
        return [trial for trial in trials if trial.params or not trial.state.is_finished()]


def _sampled_alone(study: optuna.Study) -> optuna.Study:
    view = copy.copy(study)
    view.__class__ = _SampledAlone
    return view


def build_sampler(config: SamplerConfig, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Return Optuna's sampler for one trial, seeded by the study's seed and the trial's number.

    Args:
        config: Name and options of the sampler.
        seed: Random seed of the study.
        number: Number of the trial.
    """
    parts = ("proposals",) if config.name in SEQUENCES else ("proposal", number)
    typed = _options(config)
    options = typed.model_dump(exclude_none=True)
    if RANDOM_START in type(typed).model_fields:
        options = {RANDOM_START: config.num_startup_trials} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: optuna.samplers.BaseSampler = SAMPLERS[config.name](
            seed=derived_seed(seed, *parts) % 2**32, **options
        )
    random = optuna.samplers.RandomSampler(derived_seed(seed, "proposal", number) % 2**32)
    return SampledTrialsSampler(sampler, random)
