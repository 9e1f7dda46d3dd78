"""The rows of the table of a comparison, for terminals and pages."""

from __future__ import annotations

from drtune_ray.results.comparison.compared import TOO_FEW_SEEDS
from drtune_ray.results.comparison.result import ComparisonResult
from drtune_ray.results.comparison.words import points
from drtune_ray.results.words import duration, title

HEADERS = (
    "method",
    "accuracy (95 %)",
    "difference",
    "95 % interval",
    "p (Holm)",
    "verdict",
    "settings",
    "search epochs",
    "search time",
    "s an epoch",
)


def cells(result: ComparisonResult, name: str) -> tuple[str, ...]:
    """Return the row of a method; shares in percent and points."""
    score, runs = result.compared.scores[name], result.methods[name]
    low, high = points(score.interval.low), points(score.interval.high)
    return (
        title(name),
        f"{points(score.mean)} ({low} to {high})",
        *_difference(result, name),
        str(len(runs.searched)),
        str(runs.search_epochs),
        duration(runs.search_seconds),
        f"{runs.epoch_seconds:.1f}",
    )


def _difference(result: ComparisonResult, name: str) -> tuple[str, str, str, str]:
    found = result.compared.differences.get(name)
    if found is None:
        return "-", "-", "-", "baseline"
    verdict = found.verdict
    if verdict == TOO_FEW_SEEDS:
        verdict += f" with {found.num_seeds}; {found.seeds_to_decide} needed"
    return (
        points(found.mean, is_signed=True),
        f"{points(found.interval.low, is_signed=True)} to "
        f"{points(found.interval.high, is_signed=True)}",
        "-" if found.p is None else f"{found.p:.3f}",
        verdict,
    )
