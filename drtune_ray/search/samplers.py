"""Optuna's samplers by name."""

from __future__ import annotations

import warnings

import optuna

from drtune_ray.config import SamplerConfig
from drtune_ray.training.model import derived_seed


def build_sampler(config: SamplerConfig, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler for one trial, seeded by the study's seed and the trial's number."""
    seed = derived_seed(seed, "proposal", number) % 2**32
    if config.name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # Conditional parameters are modelled together with what they depend on: `group`.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=config.num_startup_trials,
            multivariate=True,
            group=True,
            constant_liar=True,  # several trials run at a time
        )
