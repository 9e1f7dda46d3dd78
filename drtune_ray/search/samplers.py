"""Optuna's samplers by name, with their own options."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import warnings
from collections.abc import Container, Iterator, Sequence
from functools import reduce
from itertools import takewhile
from operator import or_
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from pydantic import ConfigDict, TypeAdapter, ValidationError

from drtune_ray.config.section import reason, refusal, unknown_name
from drtune_ray.config.study import SamplerConfig
from drtune_ray.errors import ConfigError
from drtune_ray.results.trials import DUPLICATE, NOT_TRAINED
from drtune_ray.training.model import derived_seed

SAMPLERS: dict[str, Any] = {
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "cma_es": optuna.samplers.CmaEsSampler,
    "qmc": optuna.samplers.QMCSampler,
    "random": optuna.samplers.RandomSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "nsga3": optuna.samplers.NSGAIIISampler,
}
# Conditional parameters are modelled together with what they depend on (`group`), and what other
# workers are trying is not tried again (`constant_liar`).
DEFAULTS: dict[str, dict[str, Any]] = {
    "tpe": {"multivariate": True, "group": True, "constant_liar": True},
    "cma_es": {"warn_independent_sampling": False},
    "gp": {"warn_independent_sampling": False},
    "qmc": {"scramble": True, "warn_independent_sampling": False},
}
PLAIN = (bool, int, float, str)
KINDS = {kind.__name__: kind for kind in PLAIN} | {"None": type(None)}
# A point of a sequence depends on all before it: the seed of the sequence must stay.
SEQUENCES = ("qmc",)
RANDOM_START = "n_startup_trials"
MAX_REPEATS = 10


def check_sampler(config: SamplerConfig) -> None:
    """Build the sampler once.

    Raises:
        ConfigError: For an option that the sampler does not have or does not take.
    """
    valid = _options(config.name)
    problems = [
        unknown_name(f"option of the sampler {config.name}", name, valid)
        for name in config.options
        if name not in valid
    ]
    problems += _wrong_types(config)
    if config.name == "cma_es" and importlib.util.find_spec("cmaes") is None:
        problems.append("sampler.name=cma_es needs a package: pip install cmaes")
    if not problems:
        try:
            build_sampler(config, 0, 0)
        except (TypeError, ValueError) as error:
            problems.append(f"sampler.options={config.options!r} are not valid: {error}")
    if problems:
        raise ConfigError(problems)


class SampledTrialsSampler(optuna.samplers.BaseSampler):
    """A sampler that sees only the trials that were sampled, and does not repeat itself for ever.

    Reference trials outside of the space, and finalists, have no parameters. Optuna's TPE counts
    them among the best tenth all the same, which then holds nothing to learn from; GP, CMA-ES, QMC
    and the genetic samplers model the parameters that all trials have in common, and would draw
    everything at random, without a word (Optuna 5.0).

    A repeated point teaches a sampler nothing, and where parameters have few values it is proposed
    again and again, by GP for ever. After `MAX_REPEATS` of them in a row points are drawn at
    random, so that a space is not taken for empty that is not.

    Args:
        sampler: The sampler.
        random: Draws at random.
    """

    def __init__(
        self, sampler: optuna.samplers.BaseSampler, random: optuna.samplers.BaseSampler
    ) -> None:
        self._sampler, self._random = sampler, random
        self._repeats: dict[int, int] = {}  # in a row before a trial

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """What is drawn together."""
        return self._of(study, trial).infer_relative_search_space(_sampled_alone(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw it."""
        sampler = self._of(study, trial)
        return sampler.sample_relative(_sampled_alone(study), trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one of the others."""
        return self._of(study, trial).sample_independent(
            _sampled_alone(study), trial, param_name, param_distribution
        )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """As Optuna calls it."""
        self._of(study, trial).before_trial(_sampled_alone(study), trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """As Optuna calls it."""
        self._of(study, trial).after_trial(_sampled_alone(study), trial, state, values)

    def _of(self, study: optuna.Study, trial: FrozenTrial) -> optuna.samplers.BaseSampler:
        """The sampler of a trial, by what came before it: the same after a resume."""
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
    """Optuna's sampler for one trial, seeded by the study's seed and the trial's number.

    Args:
        config: Which one, and its options.
        seed: Of the study.
        number: Of the trial.
    """
    parts = ("proposals",) if config.name in SEQUENCES else ("proposal", number)
    options = DEFAULTS.get(config.name, {}) | config.options
    if RANDOM_START in _options(config.name):
        options = {RANDOM_START: config.num_startup_trials} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: optuna.samplers.BaseSampler = SAMPLERS[config.name](
            seed=derived_seed(seed, *parts) % 2**32, **options
        )
    random = optuna.samplers.RandomSampler(derived_seed(seed, "proposal", number) % 2**32)
    return SampledTrialsSampler(sampler, random)


def _wrong_types(config: SamplerConfig) -> Iterator[str]:
    """Sentences on values that Optuna would take now and stumble over when it samples."""
    parameters = inspect.signature(SAMPLERS[config.name]).parameters
    for name, value in config.options.items():
        words = str(parameters[name].annotation).split(" | ") if name in parameters else []
        kinds = tuple(KINDS[word] for word in words if word in KINDS)
        if not kinds or len(kinds) < len(words):  # of something else too: Optuna's to check
            continue
        try:
            TypeAdapter(reduce(or_, kinds), config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            yield refusal(f"sampler.options.{name}", repr(value), map(reason, error.errors()))


def _options(name: str) -> list[str]:
    """Options that a file can hold; the seed is the study's."""
    parameters = inspect.signature(SAMPLERS[name]).parameters
    plain = [
        option
        for option, parameter in parameters.items()
        if option != "seed"
        and "Callable" not in str(parameter.annotation)
        and any(kind.__name__ in str(parameter.annotation) for kind in PLAIN)
    ]
    return plain
