"""The result of a comparison, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from drtune_ray.display.tables import aligned
from drtune_ray.display.text import counted, duration

if TYPE_CHECKING:
    from drtune_ray.preview.estimate import Preview
    from drtune_ray.results.comparison.result import ComparisonResult
    from drtune_ray.study.comparison_plan import Comparison
    from drtune_ray.study.folds_plan import FoldedComparison

NUM_RESULT_COLUMNS = 6


def comparison_plan_lines(comparison: Comparison | FoldedComparison) -> Iterator[str]:
    """Yield lines that describe a comparison before its first study."""
    part, num_folds = comparison.parts[0], len(comparison.parts)
    config, first = part.config, next(iter(part.studies.values()))
    yield f"Comparison {comparison.config.name!r}: {comparison.folder}"
    budget = first.budget.max_epochs or first.trials * config.trial.training.last_epoch
    finals = config.finalists
    yield (
        f"  {len(comparison.methods)} methods, each {budget} epochs of search, then the "
        f"{finals.num_configurations} best on {counted(finals.num_seeds, 'fresh seed')}, the same "
        "for all"
    )
    if num_folds > 1:
        yield f"  All of it for each of {num_folds} folds"


def comparison_lines(result: ComparisonResult) -> Iterator[str]:
    """Yield the answer, each method's verdict, the tables and the files."""
    from drtune_ray.results.comparison.result import PAGE_NAME, SEEDS_NAME
    from drtune_ray.results.comparison.table import HEADERS, cells
    from drtune_ray.results.comparison.words import held_fixed, tested_on

    if result.was_done:
        yield "This comparison is already done; nothing was left to run."
    compared = result.compared
    yield f"\n{result.conclusion}.\n"
    yield f"Accuracy in %: {tested_on(compared, result.num_openings)}"
    yield "Differences are paired, in points"
    rows = [HEADERS, *(cells(result, name) for name in result.methods)]
    yield from aligned([row[:NUM_RESULT_COLUMNS] for row in rows])
    yield ""
    yield from aligned([(row[0], *row[NUM_RESULT_COLUMNS:]) for row in rows])
    yield ""
    for text in (*result.sentences.values(), *result.gradient_shares, held_fixed(compared)):
        yield f"{text}."
    yield ""
    yield f"Picture: {result.folder / PAGE_NAME}"
    yield f"{'Folds: ' if compared.is_folds else 'Seeds: '}  {result.folder / SEEDS_NAME}"
    if result.num_unsent:
        yield f"{result.num_unsent} events wait for MLflow: the same command sends them."


def comparison_facts(result: ComparisonResult) -> dict[str, Any]:
    """Return the result for programs."""
    facts = {"exit_code": 0, "reason": "done", "folder": str(result.folder)}
    more = {"was_done": result.was_done, "num_unsent": result.num_unsent}
    return facts | result.to_mapping() | more


def previewed_lines(
    comparison: Comparison | FoldedComparison, previews: Sequence[Preview]
) -> Iterator[str]:
    """Yield what each method's study will cost, and all of them together, in all folds."""
    num_folds = len(comparison.parts)
    yield from comparison_plan_lines(comparison)
    rows = [("method", "epochs", "time")]
    for name, found in zip(comparison.parts[0].studies, previews, strict=True):
        rows.append((name, f"{found.spread('epochs').mean:.0f}", duration(found.seconds.mean)))
    num_epochs = sum(found.spread("epochs").mean for found in previews)
    seconds = [
        num_folds * sum(getattr(preview.seconds, key) for preview in previews)
        for key in ("mean", "low", "high")
    ]
    num_epochs *= num_folds
    rows.append(("together", f"{num_epochs:.0f}", duration(seconds[0])))
    yield from aligned(rows)
    low, high = map(duration, seconds[1:])
    yield f"  Time {low} to {high} in 9 of 10 cases, and the test of the final runs"


def previewed_facts(
    comparison: Comparison | FoldedComparison, previews: Sequence[Preview]
) -> dict[str, Any]:
    """Return the figures of `previewed_lines` for programs."""
    from drtune_ray.display.preview import preview_facts

    num_folds = len(comparison.parts)
    found = zip(comparison.parts[0].studies, previews, strict=True)
    return {
        "comparison": comparison.config.name,
        "folder": str(comparison.folder),
        "num_folds": num_folds,
        "seconds": num_folds * sum(preview.seconds.mean for preview in previews),
        "methods": {name: preview_facts(preview) for name, preview in found},
    }
