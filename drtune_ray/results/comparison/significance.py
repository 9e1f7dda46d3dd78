"""Tests of paired differences: sign flips over seeds, Student's t, bootstrap, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from scipy import stats

from drtune_ray.results.comparison.resampling import Floats

ALPHA = 0.05
MAX_EXACT_SEEDS = 15  # of more, a random part of the sign flips is drawn
NUM_DRAWN_FLIPS = 9_999


def smallest_p(num_seeds: int, num_comparisons: int) -> float:
    """Return the smallest p that the sign-flip test can reach after Holm's correction.

    All differences of one sign are 2 of 2^S equally likely outcomes; Holm multiplies the smallest
    p by the number of comparisons.
    """
    return min(1.0, num_comparisons * 2.0 ** (1 - num_seeds))


def seeds_to_decide(num_comparisons: int) -> int:
    """Return the smallest number of seeds with which the sign-flip test can decide."""
    return next(s for s in range(1, 1000) if smallest_p(s, num_comparisons) < ALPHA)


def sign_flip_p(differences: Floats) -> Floats:
    """Return the two-sided p of the sign-flip permutation test of a mean difference of 0.

    Exact for up to `MAX_EXACT_SEEDS` seeds. Fisher, "The design of experiments", 1935.

    Args:
        differences: One difference a seed, (S,) or (R, S).
    """
    if differences.shape[-1] > MAX_EXACT_SEEDS:
        return _drawn_flips_p(differences)
    sums = np.abs(differences @ _signs(differences.shape[-1]).T)
    # As scipy: sums that differ by rounding alone count as equal.
    is_extreme = sums >= sums[..., :1] * (1 - 1e-12)
    return np.asarray(is_extreme.mean(-1))


@cache
def _signs(number: int) -> Floats:
    """Return one of each pair of opposite vectors of signs (2^(S-1), S); the first is all ones."""
    rows = [(1.0, *rest) for rest in product((1.0, -1.0), repeat=number - 1)]
    return np.array(rows)


def _drawn_flips_p(differences: Floats) -> Floats:
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        axis=-1,
        n_resamples=NUM_DRAWN_FLIPS,
        batch=10_000,
        rng=np.random.default_rng(0),
    )
    return np.asarray(found.pvalue, dtype=np.float64)


def t_test_p(differences: Floats) -> Floats:
    """Return the two-sided p of Student's paired t-test.

    Args:
        differences: One difference a seed, (S,) or (R, S).
    """
    mean = differences.mean(-1)
    error = differences.std(-1, ddof=1) / math.sqrt(differences.shape[-1])
    # Equal differences have no spread: no evidence if they are 0, else all of it.
    ratio = np.divide(
        np.abs(mean), error, out=np.where(mean == 0, 0.0, np.inf), where=np.asarray(error) > 0
    )
    return np.asarray(2 * stats.t.sf(ratio, differences.shape[-1] - 1))


def bootstrap_p(means: Floats) -> float:
    """Return the two-sided p at which the percentile interval of resampled means (B,) ends at 0."""
    beyond = min(np.sum(means <= 0), np.sum(means >= 0))
    return float(min(1.0, 2 * (beyond + 1) / (len(means) + 1)))


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number: Holm, Scandinavian Journal of Statistics 1979."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


def corrected_resampled_t_test(
    differences: Floats, num_train: float, num_test: float, resolution: float = 0.0
) -> tuple[float, float, float]:
    """Test a mean difference over repeated folds, whose training images overlap.

    Nadeau and Bengio, "Inference for the generalization error", Machine Learning 2003: the variance
    of the mean of J differences is (1/J + n_test/n_train) s^2, not s^2/J.

    Args:
        differences: One difference a fold, of all repetitions, (J,).
        num_train: Number of training images of a fold.
        num_test: Number of test images of a fold.
        resolution: Least standard deviation s of a fold's difference that is believed: few folds
            that are equal by chance are no certainty.

    Returns:
        The two-sided p, and lower and upper end of the 95 % interval of the mean.

    Raises:
        ValueError: For fewer than two folds.
    """
    number = len(differences)
    if number < 2:
        raise ValueError(f"at least two folds are needed, but got {number}")
    mean, variance = differences.mean(), max(differences.var(ddof=1), resolution**2)
    error = math.sqrt((1 / number + num_test / num_train) * variance)
    half = stats.t.ppf(1 - ALPHA / 2, number - 1) * error
    if error == 0:
        return float(mean == 0), float(mean), float(mean)
    p = 2 * stats.t.sf(abs(mean) / error, number - 1)
    return float(p), float(mean - half), float(mean + half)
