"""What a repetition of a trial says of it: whether the figure came again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from drtune_ray.results.words import figure

if TYPE_CHECKING:
    from drtune_ray.study.repeat import Original
    from drtune_ray.study.training_run import TrainingResult


def repeated_lines(original: Original | None, result: TrainingResult) -> Iterator[str]:
    """Yield a line for people; none if no trial was repeated."""
    if original is None:
        return
    metric, value = original.metric, figure(original.metric, original.value)
    what = f"Trial {original.number} of {original.study} had {value} ({metric.label})"
    if original.came_again(result.value):
        yield f"{what}: the same figure came again"
        return
    difference = result.value - original.value
    form = f"{100 * difference:+.2f} points" if metric.is_share else f"{difference:+.4f}"
    yield (
        f"{what}: the repetition differs by {form}; other hardware, other numbers of threads and "
        "other releases of the packages round otherwise"
    )


def repeated_facts(original: Original | None, result: TrainingResult) -> dict[str, Any]:
    """Return the same for programs."""
    if original is None:
        return {}
    return {
        "repeats": {
            "study": original.study,
            "trial": original.number,
            "metric": original.metric.measure,
            original.metric.best: original.value,
            "came_again": original.came_again(result.value),
        }
    }
