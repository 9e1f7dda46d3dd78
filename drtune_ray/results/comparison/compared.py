"""The comparison of methods with a baseline: of their answers on the same images, or of folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from drtune_ray.results.comparison.power import POINT, Spread
from drtune_ray.results.comparison.resampling import (
    FOLDS,
    NUM_RESAMPLES,
    Answers,
    Floats,
    Interval,
    resampled_means,
    wider_interval,
)
from drtune_ray.results.comparison.significance import (
    ALPHA,
    bootstrap_p,
    corrected_resampled_t_test,
    holm,
    seeds_to_decide,
    sign_flip_p,
    smallest_p,
    t_test_p,
)

BETTER, WORSE, SAME = "better", "worse", "no difference"
UNDECIDED, TOO_FEW_SEEDS = "cannot be told apart", "cannot be decided"
DERIVED = ("seeds_to_decide", "seeds_to_show", "images_to_show", "more_seeds")


@dataclass(frozen=True)
class MethodScore:
    """Accuracy of a method.

    Attributes:
        accuracies: Share of correct answers of each seed.
        interval: 95 % interval of the mean over seeds and images.
    """

    accuracies: tuple[float, ...]
    interval: Interval

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.accuracies))


@dataclass(frozen=True)
class Difference:
    """Paired difference of a method to the baseline: positive where the method is better.

    Attributes:
        mean: Mean over seeds and images, as a share.
        interval: 95 % interval of it.
        verdict: `BETTER`, `WORSE`, `SAME`, `UNDECIDED` or `TOO_FEW_SEEDS`.
        p: Largest p of the three tests after Holm's correction; None where the sign-flip test
            cannot decide with so few seeds.
        num_seeds: Number of seeds.
        num_comparisons: Number of comparisons that p is corrected for.
        spread: Variances of the difference; None with one seed, and for folds.
        baseline: Name of the method to which it is the difference.
    """

    baseline: str
    mean: float
    interval: Interval
    verdict: str
    p: float | None
    num_seeds: int
    num_comparisons: int
    spread: Spread | None

    @property
    def seeds_to_decide(self) -> int:
        """Number of seeds with which the sign-flip test can decide."""
        return seeds_to_decide(self.num_comparisons)

    @property
    def seeds_to_show(self) -> int | None:
        """Number of seeds that show a difference of 1 point with a power of 80 %.

        None if no number does, or with one seed, which has no spread.
        """
        spread = self.spread
        return spread.seeds_to_show(POINT, self.num_comparisons) if spread else None

    @property
    def images_to_show(self) -> int | None:
        """Number of test images that such a difference needs at least.

        None with one seed, and where the seeds differ too much for any number.
        """
        spread = self.spread
        return spread.images_to_show(POINT, self.num_comparisons) if spread else None

    @property
    def more_seeds(self) -> int | None:
        """Number of further seeds that would show a difference of 1 point; None if none would."""
        if self.seeds_to_show is None:
            return None
        return max(0, max(self.seeds_to_show, self.seeds_to_decide) - self.num_seeds)


@dataclass(frozen=True)
class Compared:
    """Methods compared with a baseline.

    Attributes:
        num_seeds: Number of seeds S; of folds J where the images were divided again and again.
        num_images: Number of test images N, of a fold on average.
        scores: Accuracy of each method, the baselines included.
        differences: Difference of each other method to its baseline.
        is_folds: Whether accuracies and differences are of folds instead of seeds.
    """

    num_seeds: int
    num_images: int
    scores: dict[str, MethodScore]
    differences: dict[str, Difference]
    is_folds: bool = False

    @property
    def baselines(self) -> list[str]:
        """Names of the baselines."""
        return list(dict.fromkeys(found.baseline for found in self.differences.values()))

    def to_mapping(self) -> dict[str, Any]:
        """Return everything as plain values."""
        scores = {name: asdict(score) | {"mean": score.mean} for name, score in self.scores.items()}
        differences = {
            name: asdict(found) | {key: getattr(found, key) for key in DERIVED}
            for name, found in self.differences.items()
        }
        return vars(self) | {"scores": scores, "differences": differences}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Compared:
        """Return the comparison of `to_mapping`."""
        scores = {
            name: MethodScore(tuple(each["accuracies"]), Interval(**each["interval"]))
            for name, each in values["scores"].items()
        }
        differences = {name: _difference(**each) for name, each in values["differences"].items()}
        return cls(**dict(values) | {"scores": scores, "differences": differences})


def _difference(interval: dict[str, Any], spread: dict[str, Any] | None, **rest: Any) -> Difference:
    known = {key: value for key, value in rest.items() if key not in DERIVED}
    of = Spread(**spread) if spread else None
    return Difference(interval=Interval(**interval), spread=of, **known)


def compare(
    answers: Mapping[str, Answers],
    baselines: Mapping[str, str],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Compared:
    """Compare methods with their baselines.

    Args:
        answers: Whether each image was classified correctly, (S, N) for each method: the same
            seeds and images in the same order.
        baselines: Name of the baseline of each other method.
        seed: Random seed of the bootstrap.
        num_resamples: Number of resamples of the bootstrap.

    Raises:
        ValueError: If the shapes differ.
    """
    if len({of_method.shape for of_method in answers.values()}) != 1:
        shapes = {name: of_method.shape for name, of_method in answers.items()}
        raise ValueError(f"all methods need the same seeds and images, but got {shapes}")
    means = resampled_means(answers, seed, num_resamples)
    scores = {name: _score(answers[name], means[name]) for name in answers}
    paired = {
        name: answers[name].astype(np.float64) - answers[baseline].astype(np.float64)
        for name, baseline in baselines.items()
    }
    shifts = {name: means[name] - means[baseline] for name, baseline in baselines.items()}
    corrected = holm([_p(paired[name], shifts[name]) for name in baselines])
    differences = {
        name: _compared(baseline, paired[name], shifts[name], p, len(baselines))
        for (name, baseline), p in zip(baselines.items(), corrected, strict=True)
    }
    num_seeds, num_images = next(iter(answers.values())).shape
    return Compared(num_seeds, num_images, scores, differences)


def compare_folds(
    accuracies: Mapping[str, Sequence[float]],
    baseline: str,
    num_train: float,
    num_test: float,
) -> Compared:
    """Compare methods with a baseline over the folds of a repeated cross-validation.

    Intervals and p are of the corrected resampled t-test, p after Holm's correction. Accuracies are
    multiples of one image: a smaller spread over the folds is not believed.

    Args:
        accuracies: Accuracy of each method on the test images of each fold, (J,), in one order.
        baseline: Name of the baseline among them.
        num_train: Number of training images of a fold, on average.
        num_test: Number of test images of a fold, on average.

    Raises:
        ValueError: For fewer than two folds.
    """
    values = {name: np.array(found, np.float64) for name, found in accuracies.items()}
    tested = {
        name: corrected_resampled_t_test(found, num_train, num_test, 1 / num_test)
        for name, found in values.items()
    }
    scores = {
        name: MethodScore(
            tuple(map(float, values[name])), Interval(max(0.0, low), min(1.0, high), FOLDS)
        )
        for name, (_, low, high) in tested.items()
    }
    others = [name for name in values if name != baseline]
    paired = {name: values[name] - values[baseline] for name in others}
    found = {
        name: corrected_resampled_t_test(paired[name], num_train, num_test, 1 / num_test)
        for name in others
    }
    corrected = holm([found[name][0] for name in others])
    differences = {}
    for name, p in zip(others, corrected, strict=True):
        mean = float(paired[name].mean())
        differences[name] = Difference(
            baseline,
            mean,
            Interval(*found[name][1:], FOLDS),
            _verdict(paired[name], mean, p, can_decide=True),
            p,
            len(paired[name]),
            len(others),
            None,
        )
    number = len(values[baseline])
    return Compared(number, round(num_test), scores, differences, is_folds=True)


def _score(of_method: Answers, means: Floats) -> MethodScore:
    accuracies = of_method.mean(1)
    return MethodScore(tuple(map(float, accuracies)), wider_interval(accuracies, means))


def _p(differences: Floats, means: Floats) -> float:
    """Return the largest p of the three tests, so that a difference must pass each of them."""
    per_seed = differences.mean(1)
    if len(per_seed) < 2:
        return 1.0
    return max(float(sign_flip_p(per_seed)), float(t_test_p(per_seed)), bootstrap_p(means))


def _compared(
    baseline: str, differences: Floats, means: Floats, p: float, num_comparisons: int
) -> Difference:
    num_seeds = len(differences)
    can_decide = smallest_p(num_seeds, num_comparisons) < ALPHA
    mean = float(differences.mean())
    return Difference(
        baseline,
        mean,
        wider_interval(differences.mean(1), means),
        _verdict(differences, mean, p, can_decide=can_decide),
        p if can_decide else None,
        num_seeds,
        num_comparisons,
        Spread.of(differences) if num_seeds > 1 else None,
    )


def _verdict(differences: Floats, mean: float, p: float, *, can_decide: bool) -> str:
    if not differences.any():
        return SAME
    if not can_decide:
        return TOO_FEW_SEEDS
    if p >= ALPHA:
        return UNDECIDED
    return BETTER if mean > 0 else WORSE
