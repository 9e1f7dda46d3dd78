"""Options of each sampler under Optuna's names: typed, with the defaults that a study uses.

None leaves an option to Optuna. Where a default differs from Optuna's, the text says so. The random
seed is the study's, and options that take functions or objects have no place in a file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from drtune_ray.config.section import Probability, Section
from drtune_ray.config.study import SamplerName


class SamplerOptions(Section):
    """Options of a sampler, taken as they are: no text for a number, no number for a switch."""

    model_config = ConfigDict(strict=True)


class StartupOptions(SamplerOptions):
    """Options of a sampler that draws its first trials at random."""

    n_startup_trials: int | None = None
    """Trials drawn at random first. Default: `sampler.num_startup_trials`."""


class TPEOptions(StartupOptions):
    """Tree-structured Parzen estimator."""

    multivariate: bool | None = True
    """Model the parameters together. Optuna's default, null: with one objective only."""

    group: bool = True
    """Model conditional parameters together with those that they depend on; needs `multivariate`.
    Optuna's default: false."""

    constant_liar: bool = True
    """Avoid the neighbourhood of trials that are still running."""

    n_ei_candidates: int = 24
    """Candidates among which the expected improvement is maximised."""

    prior_weight: float | None = None
    """Weight of the prior; deprecated by Optuna. Default: 1."""

    consider_prior: bool | None = None
    """Without effect since Optuna 4.3, which always uses a prior."""

    consider_magic_clip: bool | None = None
    """Bound the smallest widths of the estimator; deprecated by Optuna. Default: true."""

    consider_endpoints: bool | None = None
    """Take the ends of a range into account for the widths; deprecated by Optuna.
    Default: false."""

    warn_independent_sampling: bool | None = None
    """Log a warning for each parameter that is sampled alone; deprecated by Optuna.
    Default: false."""


class GPOptions(StartupOptions):
    """Gaussian process."""

    deterministic_objective: bool = False
    """Assume that a configuration always gives the same accuracy."""

    warn_independent_sampling: bool = False
    """Log a warning for each parameter that is sampled alone. Optuna's default: true."""


class CmaEsOptions(StartupOptions):
    """Covariance matrix adaptation evolution strategy."""

    sigma0: float | None = None
    """Initial standard deviation; deprecated by Optuna. Default: a sixth of the smallest range."""

    x0: dict[str, Any] | None = None
    """Initial value of each parameter by name; deprecated by Optuna.
    Default: the middle of its range."""

    popsize: int | None = None
    """Population size. Default: by the number of parameters."""

    consider_pruned_trials: bool = False
    """Learn from trials that were stopped early too."""

    use_separable_cma: bool = False
    """Adapt a diagonal covariance matrix."""

    with_margin: bool = False
    """Keep parameters with steps from being fixed at one value."""

    lr_adapt: bool = False
    """Adapt the learning rate, for noisy or multimodal objectives."""

    restart_strategy: str | None = None
    """Without effect since Optuna 4.4, which does not restart."""

    inc_popsize: int = -1
    """Without effect since Optuna 4.4, which does not restart."""

    warn_independent_sampling: bool = False
    """Log a warning for each parameter that is sampled alone. Optuna's default: true."""


class QMCOptions(SamplerOptions):
    """Quasi-Monte Carlo sequence."""

    qmc_type: Literal["sobol", "halton"] = "sobol"
    """Sequence of points."""

    scramble: bool = True
    """Randomise the sequence by the study's seed. Optuna's default: false."""

    warn_asynchronous_seeding: bool = True
    """Without effect here: the sequence is always seeded."""

    warn_independent_sampling: bool = False
    """Log a warning for each parameter that is sampled alone. Optuna's default: true."""


class RandomOptions(SamplerOptions):
    """Random search, which has no options."""


class NSGA2Options(SamplerOptions):
    """Non-dominated sorting genetic algorithm II."""

    population_size: Annotated[int, Field(ge=2)] = 50
    """Trials of a generation."""

    mutation_prob: Probability | None = None
    """Probability that a parameter is drawn anew. Default: 1 / number of parameters."""

    crossover_prob: Probability = 0.9
    """Probability that a trial has two parents."""

    swapping_prob: Probability = 0.5
    """Probability that a parameter is taken from the second parent."""


class NSGA3Options(NSGA2Options):
    """Non-dominated sorting genetic algorithm III."""

    dividing_parameter: int = 3
    """Divisions of each axis between reference points."""


SAMPLER_OPTIONS: dict[SamplerName, type[SamplerOptions]] = {
    "tpe": TPEOptions,
    "gp": GPOptions,
    "cma_es": CmaEsOptions,
    "qmc": QMCOptions,
    "random": RandomOptions,
    "nsga2": NSGA2Options,
    "nsga3": NSGA3Options,
}
