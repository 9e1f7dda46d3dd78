"""The order of a space's parameters, and the points at which it is tried before it is searched."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

from drtune_ray.space.expressions import Expression, ExpressionError
from drtune_ray.space.parameters import RANGES, Condition, Parameter, Resolved

MAX_POINTS = 4000
Thresholds = Mapping[str, Collection[float]]


def in_order(
    parameters: Sequence[Parameter],
) -> tuple[list[Parameter], list[list[Parameter]]]:
    """Parameters with what they depend on before them, else as declared; and the cycles."""
    ordered: list[Parameter] = []
    cycles: list[list[Parameter]] = []
    left = list(parameters)
    while left:
        waiting = {parameter.path for parameter in left}
        ready = next((p for p in left if not p.reads() & waiting), None)
        if ready is not None:
            ordered.append(ready)
        else:
            cycles.append(_cycle(left))
        done = [ready] if ready is not None else cycles[-1]
        left = [parameter for parameter in left if parameter not in done]
    return ordered, cycles


def _cycle(parameters: Sequence[Parameter]) -> list[Parameter]:
    """A cycle among parameters each of which depends on another of them."""
    by_path = {parameter.path: parameter for parameter in parameters}
    walk = [parameters[0]]
    while True:
        following = by_path[min(walk[-1].reads() & by_path.keys())]
        if following in walk:
            return walk[walk.index(following) :]
        walk.append(following)


def needed_for(parameters: Sequence[Parameter], paths: Iterable[str]) -> list[Parameter]:
    """The parameters that decide the value or activity of some paths, in their order."""
    needed, found = set(paths), []
    for parameter in reversed(parameters):
        if parameter.path in needed:
            needed |= parameter.reads()
            found.append(parameter)
    return found[::-1]


def corners(
    parameters: Sequence[Parameter], values: Mapping[str, Any], thresholds: Thresholds
) -> Iterator[Resolved]:
    """Points of a space: every combination of ends, categories and values around thresholds.

    Args:
        parameters: In an order in which each reads earlier ones only.
        values: Every setting of the base, and facts.
        thresholds: Numbers that parameters are compared with.

    Yields:
        `MAX_POINTS` + 1 at most: so many, and they are not all.

    Raises:
        UnknownFact: If a condition or expression uses a fact that `values` lack.
    """
    start = Resolved(values, {}, frozenset())
    yield from islice(_walk(parameters, start, thresholds), MAX_POINTS + 1)


def _walk(
    parameters: Sequence[Parameter], point: Resolved, thresholds: Thresholds
) -> Iterator[Resolved]:
    if not parameters:
        yield point
        return
    parameter, rest = parameters[0], parameters[1:]
    tried = _tried(parameter, point, thresholds)
    if not tried:
        yield from _walk(
            rest, replace(point, inactive=point.inactive | {parameter.path}), thresholds
        )
    for value in tried:
        values = {**point.values, parameter.path: value}
        taken = {**point.taken, parameter.path: value}
        yield from _walk(rest, Resolved(values, taken, point.inactive), thresholds)


def _tried(parameter: Parameter, point: Resolved, thresholds: Thresholds) -> tuple[Any, ...]:
    """The values to try; none where the parameter does not apply, or where that has no answer."""
    try:
        if not parameter.when.holds(point.values, point.inactive):
            return ()
        if not parameter.is_sampled:
            return (parameter.derived(point.values),)
    except ExpressionError:  # a problem of its own
        return ()
    return tried_values(parameter, thresholds.get(parameter.path, ()))


def tried_values(parameter: Parameter, thresholds: Collection[float] = ()) -> tuple[Any, ...]:
    """Every category; of a range both ends, each threshold and a value between neighbours."""
    if parameter.kind not in RANGES or not thresholds:
        return tuple(dict.fromkeys(parameter.ends()))
    low, high = parameter.bounds
    marks = sorted({low, high, *(float(t) for t in thresholds if low < t < high)})
    between = [(left + right) / 2 for left, right in pairwise(marks)]
    step = parameter.step or (1.0 if parameter.kind == "int" else None)
    if step is None:
        return tuple(sorted({*marks, *between}))
    rungs = {
        rounded((mark - low) / step)
        for mark in (*marks, *between)
        for rounded in (math.floor, math.ceil)
    }
    grid = (low + rung * step for rung in sorted(rungs))
    return tuple(int(value) if parameter.kind == "int" else value for value in grid)


# ---- whether the corners decide


def thresholds_in(
    expressions: Iterable[Expression], conditions: Iterable[Condition], facts: Mapping[str, Any]
) -> dict[str, set[float]]:
    """The numbers that settings are compared with in expressions and plain conditions."""
    found: dict[str, set[float]] = defaultdict(set)
    for expression in expressions:
        for path, numbers in expression.thresholds(facts).items():
            found[path].update(numbers or ())
    for condition in conditions:
        for path, allowed in condition.values:
            found[path].update(float(v) for v in allowed if isinstance(v, int | float))
    return found


def corners_decide(
    expression: Expression | None,
    others: Iterable[Expression],
    parameters: Sequence[Parameter],
    facts: Mapping[str, Any],
) -> bool:
    """Whether an expression that is true at no corner is true nowhere.

    So it is where ranges are only compared with numbers, since nothing changes between those; and
    where it is one comparison of sides that rise or fall steadily with each setting, if no other
    expression cuts the ranges.
    """
    ranges = {parameter.path for parameter in parameters if parameter.kind in RANGES}

    def only_compares(each: Expression) -> bool:
        return all(
            numbers is not None
            for path, numbers in each.thresholds(facts).items()
            if path in ranges
        )

    others = list(others)
    if all(only_compares(each) for each in others):
        if expression is None or only_compares(expression):
            return True
        is_cut = any(each.reads() & ranges for each in others)
        return expression.is_monotone() and not is_cut
    return False
