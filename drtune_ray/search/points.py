"""Points of a search space that the user gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drtune_ray.config.section import unknown_name
from drtune_ray.errors import ConfigError
from drtune_ray.search.space import SearchSpace
from drtune_ray.values import flattened


def start_points(
    space: SearchSpace, given: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], ...]:
    """The values of each point by their names in the Optuna study.

    Args:
        space: On images that were read.
        given: Values by dotted path or nested; what a point leaves open is sampled.

    Raises:
        ConfigError: Naming every value that is not one of the space.
    """
    sampled = {p.path: p for p in space.parameters if p.is_sampled}
    points, problems = [], []
    for number, values in enumerate(given, 1):
        point = {}
        for path, value in flattened(values).items():
            if path not in sampled:
                problems.append(
                    f"start_with, point {number}: {unknown_name('parameter', path, sampled)} "
                    "(what the space does not search belongs into trial)"
                )
            elif not sampled[path].holds(value):
                parameter = sampled[path]
                problems.append(
                    f"start_with, point {number}: {path}={value!r} is not in the search space: "
                    f"{parameter.to_plain()}"
                )
            else:
                point[sampled[path].name] = sampled[path].stored(value)
        points.append(point)
    if problems:
        raise ConfigError(problems)
    return tuple(points)
