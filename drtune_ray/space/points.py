"""The points at which a search space is tried: drawn at random, or every combination.

Uniform draws rarely hit the values that matter, so half of the draws are ends of ranges or values
that conditions and expressions name.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise, product
from typing import Any

from drtune_ray.space.expressions import Expression
from drtune_ray.space.parameters import RANGES, Parameter, Resolved, resolve

NUM_RANDOM, SEED = 512, 0
MAX_COMBINATIONS = 4000
Named = Mapping[str, Collection[Any]]


def points(
    sampled: Sequence[Parameter], named: Named, values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return distinct points, the same ones in every process: a value by path for each parameter.

    First the base (the low end of a range that excludes its value), then each end and category
    with the rest at the base, then `NUM_RANDOM` random draws.

    Args:
        sampled: Sampled parameters.
        named: Values to draw more often, see `named_values`.
        values: Every setting of the base by its path.
    """
    base = {p.path: values[p.path] if p.holds(values[p.path]) else p.ends()[0] for p in sampled}
    special = {p.path: _special_values(p, named.get(p.path, ())) for p in sampled}
    generator = random.Random(SEED)  # nosec B311 # no secret: the same points everywhere
    found = [
        base,
        *(base | {p.path: end} for p in sampled for end in p.ends()),
        *(
            {p.path: _drawn(p, special[p.path], generator) for p in sampled}
            for _ in range(NUM_RANDOM)
        ),
    ]
    return list({tuple(point.values()): point for point in found}.values())


def combinations(parameters: Sequence[Parameter], values: Mapping[str, Any]) -> Iterator[Resolved]:
    """Yield every combination of the categories and of the special values of ranges.

    Args:
        parameters: Parameters in an order in which each reads earlier ones only.
        values: Every setting of the base by its path, and the facts.

    Yields:
        At most `MAX_COMBINATIONS` points.

    Raises:
        ExpressionError: If an expression cannot be computed.
        UnknownFact: If an expression uses a fact that `values` lack.
    """
    sampled = [parameter for parameter in parameters if parameter.is_sampled]
    named = named_values(parameters, (), values)
    choices = [p.values or _special_values(p, named.get(p.path, ())) for p in sampled]
    for chosen in islice(product(*choices), MAX_COMBINATIONS):
        by_parameter = dict(zip(sampled, chosen, strict=True))
        yield resolve(parameters, values, by_parameter.__getitem__)


def needed_for(parameters: Sequence[Parameter], paths: Iterable[str]) -> list[Parameter]:
    """Return the parameters that decide the value or activity of some paths, in their order."""
    needed, found = set(paths), []
    for parameter in reversed(parameters):
        if parameter.path in needed:
            needed |= parameter.reads()
            found.append(parameter)
    return found[::-1]


def named_values(
    parameters: Sequence[Parameter], constraints: Sequence[Expression], facts: Mapping[str, Any]
) -> Named:
    """Return, by path, the values and facts that stand beside settings in a space."""
    named: dict[str, set[Any]] = defaultdict(set)
    for parameter in parameters:
        for path, allowed in parameter.when.values:
            named[path].update(allowed)
    for expression in (*constraints, *(e for p in parameters for e in p.expressions())):
        known = {facts[fact] for fact in expression.facts() if fact in facts}
        for path in expression.reads():
            named[path] |= expression.literals() | known
    return named


def _special_values(parameter: Parameter, named: Collection[Any]) -> tuple[Any, ...]:
    """Return both ends and the named values; of a range also one value between such neighbours."""
    if parameter.kind not in RANGES:
        ends = (parameter.values[0], parameter.values[-1])
        return tuple(value for value in parameter.values if value in (*ends, *named))
    low, high = parameter.bounds
    within = {v for v in named if isinstance(v, int | float) and low < v < high}
    marks = sorted({low, high, *map(float, within)})
    between = [(left + right) / 2 for left, right in pairwise(marks)] if within else []
    return tuple(dict.fromkeys(_on_step(parameter, mark) for mark in (*marks, *between)))


def _drawn(parameter: Parameter, special: Sequence[Any], generator: random.Random) -> Any:
    if generator.random() < 0.5:
        return generator.choice(special)
    if parameter.kind not in RANGES:
        return generator.choice(parameter.values)
    low, high = parameter.bounds
    if parameter.log:
        return _on_step(parameter, math.exp(generator.uniform(math.log(low), math.log(high))))
    return _on_step(parameter, generator.uniform(low, high))


def _on_step(parameter: Parameter, value: float) -> float:
    """Return the nearest value of a range."""
    low, high = parameter.bounds
    step = parameter.step or (1.0 if parameter.kind == "int" else None)
    if step is not None:
        value = low + round((value - low) / step) * step
    value = min(max(value, low), high)
    return int(value) if parameter.kind == "int" else value
