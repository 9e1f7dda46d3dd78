"""How many seeds would show a difference: from the paired variance, by simulating the tests."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import stats

from drtune_ray.results.comparison.resampling import Floats
from drtune_ray.results.comparison.significance import ALPHA, sign_flip_p, t_test_p

POWER = 0.8
POINT = 0.01  # one percentage point of accuracy
MAX_SEEDS = 1000
NUM_SIMULATED = 1000
# With more seeds the sign-flip test and the t-test hardly differ.
MAX_FLIPPED_SEEDS = 10


@dataclass(frozen=True)
class Spread:
    """Variances of a paired difference between two methods.

    Attributes:
        of_seeds: Variance of the mean difference of a seed on these images.
        of_images: Variance of the difference between images, beyond chance.
        of_rest: Variance of what neither a seed nor an image explains.
        num_images: Number of images.
    """

    of_seeds: float
    of_images: float
    of_rest: float
    num_images: int

    @classmethod
    def of(cls, differences: Floats) -> Spread:
        """Return the variances of differences (S, N), at least two seeds.

        Method of moments of the two-way layout: Searle, Casella and McCulloch, "Variance
        components", 1992, ch. 4.
        """
        num_seeds, num_images = differences.shape
        rows, columns = differences.mean(1), differences.mean(0)
        rest = differences - rows[:, None] - columns[None] + differences.mean()
        degrees = (num_seeds - 1) * max(1, num_images - 1)
        of_rest = float((rest**2).sum() / degrees)
        between = float(columns.var(ddof=1)) if num_images > 1 else 0.0
        of_images = max(0.0, between - of_rest / num_seeds)
        return cls(float(rows.var(ddof=1)), of_images, of_rest, num_images)

    def power(self, num_seeds: int, difference: float, num_comparisons: int = 1) -> float:
        """Return the chance to show a true difference; see `differs`.

        Args:
            num_seeds: Number of seeds, at least two.
            difference: The true difference.
            num_comparisons: Number of comparisons that Holm corrects for, which counts in full.
        """
        random = np.random.default_rng(0)
        of_set = math.sqrt(self.of_images / self.num_images)
        shift = random.normal(difference, of_set, NUM_SIMULATED) if of_set else difference
        noise = random.normal(0, math.sqrt(self.of_seeds), (NUM_SIMULATED, num_seeds))
        drawn = np.broadcast_to(shift, NUM_SIMULATED)[:, None] + noise
        is_shown = self._largest_p(drawn) * num_comparisons < ALPHA
        return float(np.mean(is_shown & (drawn.mean(1) > 0)))

    def _largest_p(self, drawn: Floats) -> Floats:
        """Return the largest p of the three tests for drawn differences of the seeds (R, S)."""
        num_seeds = drawn.shape[1]
        # What the two-way bootstrap has for its variance; see `resampling`.
        variance = (
            (num_seeds - 1) / num_seeds**2 * drawn.var(1, ddof=1)
            + self.of_images / self.num_images
            + 2 * self.of_rest / (num_seeds * self.num_images)
        )
        of_both = 2 * stats.norm.sf(np.abs(drawn.mean(1)) / np.sqrt(np.maximum(variance, 1e-18)))
        found = np.maximum(of_both, t_test_p(drawn))
        if num_seeds <= MAX_FLIPPED_SEEDS:
            found = np.maximum(found, sign_flip_p(drawn))
        return np.asarray(found)

    def seeds_to_show(
        self, difference: float = POINT, num_comparisons: int = 1, power: float = POWER
    ) -> int | None:
        """Return how many seeds show a true difference with a power; None if no number does."""
        return _seeds_to_show(self, difference, num_comparisons, power)

    def images_to_show(self, difference: float = POINT, num_comparisons: int = 1) -> int | None:
        """Return about how many test images show a true difference with `MAX_SEEDS` seeds.

        They are more than those of the comparison wherever :meth:`seeds_to_show` finds no number.
        None if the seeds differ so much that no number of images does.

        Args:
            difference: The true difference.
            num_comparisons: Number of comparisons that Holm corrects for.
        """
        steps = stats.norm.ppf(1 - ALPHA / (2 * num_comparisons)) + stats.norm.ppf(POWER)

        def suffices(spread: Spread) -> bool:
            return spread.power(MAX_SEEDS, difference, num_comparisons) >= POWER

        if not suffices(replace(self, of_images=0.0, of_rest=0.0)):
            return None
        number = max(1, math.ceil(self.of_images * float(steps / difference) ** 2))
        while not suffices(replace(self, num_images=number)):
            number = math.ceil(1.02 * number)
        return number


@cache
def _seeds_to_show(
    spread: Spread, difference: float, num_comparisons: int, power: float
) -> int | None:
    def suffices(number: int) -> bool:
        return spread.power(number, difference, num_comparisons) >= power

    high = 2
    while not suffices(high):
        if high >= MAX_SEEDS:
            return None
        high = min(2 * high, MAX_SEEDS)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high
