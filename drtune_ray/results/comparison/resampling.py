"""Means over seeds and images, and their two-way bootstrap.

S seeds, N images, B resamples. An answer is whether an image was classified correctly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Answers = NDArray[np.bool_]  # (S, N)
Floats = NDArray[np.float64]

LEVEL = 0.95
T, BOOTSTRAP, FOLDS = "t", "bootstrap", "folds"  # kinds of intervals
NUM_RESAMPLES = 4000
CHUNK = 250  # resamples at a time, which bounds the memory


@dataclass(frozen=True)
class Interval:
    """An interval at the level `LEVEL`.

    Attributes:
        low: Lower end.
        high: Upper end.
        kind: How it was computed: `t` over seeds, `bootstrap` over seeds and images, or `folds`
            by the corrected resampled t-test.
    """

    low: float
    high: float
    kind: str

    @property
    def width(self) -> float:
        """Length of the interval."""
        return self.high - self.low


def resampled_means(
    answers: Mapping[str, Answers], seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Floats]:
    """Resample seeds and images, crossed, and return the mean of each method in each resample (B,).

    All methods share the resampled seeds and images, so that the difference of two results is the
    bootstrap of the paired difference. Owen, "The pigeonhole bootstrap", Annals of Applied
    Statistics 2007: its variance is a little too large rather than too small.

    Args:
        answers: Answers (S, N) of each method, with the same seeds and images in the same order.
        seed: Random seed.
        num_resamples: Number of resamples B.
    """
    random = np.random.default_rng(seed)
    num_seeds, num_images = next(iter(answers.values())).shape
    means: dict[str, list[Floats]] = {name: [] for name in answers}
    for start in range(0, num_resamples, CHUNK):
        size = min(CHUNK, num_resamples - start)
        rows = _counts(random, num_seeds, size)
        columns = _counts(random, num_images, size)
        for name, of_method in answers.items():
            means[name].append(_weighted_means(of_method, rows, columns))
    return {name: np.concatenate(parts) for name, parts in means.items()}


def _counts(random: np.random.Generator, number: int, size: int) -> Floats:
    """Return how often each of `number` items is drawn with replacement, (size, number)."""
    drawn = random.integers(number, size=(size, number)) + number * np.arange(size)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number)
    return counts.astype(np.float64)


def _weighted_means(of_method: Answers, rows: Floats, columns: Floats) -> Floats:
    sums: Floats = ((rows @ of_method.astype(np.float64)) * columns).sum(1)
    return sums / of_method.size


def bootstrap_interval(means: Floats) -> Interval:
    """Return the percentile interval of resampled means (B,)."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high), BOOTSTRAP)


def t_interval(values: Floats) -> Interval | None:
    """Return Student's interval of the mean of one value a seed (S,); None for a single seed."""
    if len(values) < 2:
        return None
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values)
    return Interval(float(values.mean() - half), float(values.mean() + half), T)


def wider_interval(per_seed: Floats, means: Floats) -> Interval:
    """Return the wider of the interval over seeds and the two-way bootstrap.

    The first knows nothing of which images were drawn for the test; the second is too narrow for
    few seeds.

    Args:
        per_seed: One value a seed (S,).
        means: Resampled means of the same quantity (B,).
    """
    over_seeds, over_both = t_interval(per_seed), bootstrap_interval(means)
    if over_seeds is None or over_both.width >= over_seeds.width:
        return over_both
    return over_seeds
