"""The verdicts of a comparison in words."""

from __future__ import annotations

from drtune_ray.results.comparison.compared import (
    BETTER,
    SAME,
    TOO_FEW_SEEDS,
    WORSE,
    Compared,
    Difference,
)
from drtune_ray.results.comparison.power import POINT
from drtune_ray.results.words import counted, title

SMALL_GRADIENT_SHARE = 0.1  # below it DR hardly moves the head


def points(share: float, *, is_signed: bool = False) -> str:
    """Return a share in percentage points, with one digit."""
    value = round(100 * share, 1) + 0.0  # no -0.0
    return f"{value:+.1f}" if is_signed else f"{value:.1f}"


def span(difference: Difference) -> str:
    """Return a difference with its interval, in points."""
    low, high = points(difference.interval.low), points(difference.interval.high)
    return f"{points(difference.mean, is_signed=True)} points ({low} to {high})"


def sentence(name: str, compared: Compared) -> str:
    """Return the verdict on a method."""
    found = compared.differences[name]
    one, other = title(name), title(found.baseline)
    if found.verdict == SAME:
        what = "accuracy in every fold" if compared.is_folds else "answers on every image"
        return f"{one} and {other}: no difference, the same {what}"
    if found.verdict == TOO_FEW_SEEDS:
        return (
            f"{one} against {other}: {span(found)}; cannot be decided with "
            f"{counted(found.num_seeds, 'seed')}; {found.seeds_to_decide} needed"
        )
    if found.verdict == BETTER:
        return f"{one} is better than {other} by {_by(found, 1)}"
    if found.verdict == WORSE:
        return f"{one} is worse than {other} by {_by(found, -1)}"
    return f"{one} and {other} cannot be told apart: {span(found)}; {_way_on(found, compared)}"


def _by(found: Difference, sign: int) -> str:
    ends = sorted((sign * found.interval.low, sign * found.interval.high))
    low, high = map(points, ends)
    return f"{points(sign * found.mean)} points ({low} to {high})"


def _way_on(found: Difference, compared: Compared) -> str:
    """Return how many further seeds would show a difference of one point."""
    if compared.is_folds:
        return "more images narrow the interval, further repeats only a little"
    if found.more_seeds is None and found.images_to_show is None:
        return "the seeds differ too much to show a difference of 1 point with any number"
    if found.more_seeds is None:
        return (
            f"no number of seeds would show a difference of 1 point on {compared.num_images} test "
            f"images: about {found.images_to_show} are needed"
        )
    if found.more_seeds == 0:
        return f"{found.num_seeds} seeds are enough to show a difference of 1 point"
    more = counted(found.more_seeds, "more seed")
    return f"{more} would show a difference of 1 point"


def tested_on(compared: Compared, num_openings: int) -> str:
    """Return what the accuracies were measured on."""
    if compared.is_folds:
        return (
            f"{compared.num_seeds} folds with searches and models of their own, each opened once; "
            f"about {compared.num_images} test images a fold"
        )
    return (
        f"{counted(compared.num_seeds, 'seed')} a method, {compared.num_images} images of the "
        f"sealed test split (opening {num_openings})"
    )


def held_fixed(compared: Compared) -> str:
    """Return what the intervals do not cover."""
    if compared.is_folds:
        return "Each fold has a search of its own a method: the intervals cover that too"
    return (
        "Each method was searched once: the intervals cover seeds and test images, not what "
        "another search would have found"
    )


def gradient_share(name: str, share: float) -> str:
    """Return how much of the head's gradient is distribution regularization (DR)."""
    text = f"{title(name)}: DR is {100 * share:.0f} % of the head's gradient"
    return f"{text}, CE-tuning in all but name" if share < SMALL_GRADIENT_SHARE else text


def conclusion(compared: Compared) -> str:
    """Return the answer to whether another method is better than its baseline."""
    answers = [_conclusion(compared, baseline) for baseline in compared.baselines]
    return "; ".join(dict.fromkeys(answers))


def _conclusion(compared: Compared, baseline: str) -> str:
    """Return the answer for the methods that have this baseline."""
    found = {n: each for n, each in compared.differences.items() if each.baseline == baseline}
    better = [name for name in found if found[name].verdict == BETTER]
    if better:
        best_first = sorted(better, key=lambda name: -found[name].mean)
        return "; ".join(sentence(name, compared) for name in best_first)
    if all(each.interval.high < POINT for each in found.values()):
        return f"{title(baseline)} is enough: no other method is better by 1 point or more"
    if len(found) == 1:
        return sentence(next(iter(found)), compared)
    few = [each for each in found.values() if each.verdict == TOO_FEW_SEEDS]
    if few:
        return (
            f"Cannot be decided with {counted(compared.num_seeds, 'seed')}; "
            f"{few[0].seeds_to_decide} needed"
        )
    return (
        f"No method can be told to be better than {title(baseline)}; each one's line says what is "
        "missing"
    )
