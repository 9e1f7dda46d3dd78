"""Answers of methods on test images, drawn from a model with known differences."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import stats

from drtune_ray.results.comparison.resampling import Answers


def answers(
    random: np.random.Generator,
    num_seeds: int,
    num_images: int,
    gains: tuple[float, ...] = (0.0, 0.0),
    *,
    of_seed: float = 0.1,
    of_image: float = 0.2,
) -> dict[str, Answers]:
    """Answers by a probit model: shared difficulty of the images, chance, and what a method has.

    Args:
        random: Generator.
        num_seeds: Number of seeds.
        num_images: Number of images.
        gains: What is added to the score of each method.
        of_seed: Standard deviation of a method's score from seed to seed.
        of_image: Standard deviation of a method's score from image to image.
    """
    difficulty = random.normal(0.8, 1.0, num_images)
    found = {}
    for index, gain in enumerate(gains):
        seeds = random.normal(0, of_seed, (num_seeds, 1))
        images = random.normal(0, of_image, num_images)
        noise = random.normal(0, 0.5, (num_seeds, num_images))
        found["ab"[index] if index < 2 else f"m{index}"] = (
            difficulty + images + seeds + noise + gain > 0
        )
    return found


def gain_of(difference: float, *, of_seed: float = 0.1, of_image: float = 0.2) -> float:
    """The gain that raises the accuracy of the model by a difference."""
    spread = float(np.sqrt(1 + of_seed**2 + of_image**2 + 0.25))
    base = float(stats.norm.cdf(0.8 / spread))
    return float(stats.norm.ppf(base + difference)) * spread - 0.8


def against(baseline: str, names: Iterable[str]) -> dict[str, str]:
    """Return the one baseline of all other methods."""
    return {name: baseline for name in names if name != baseline}
