"""Check that a search space makes sense on the configuration that it varies.

The space is tried at some 512 points, see `points`: does each parameter apply somewhere, can each
expression be computed, do the values make valid trials, does each constraint hold somewhere?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.space.expressions import Expression, ExpressionError, UnknownFact
from drtune_ray.space.parameters import RANGES, Parameter
from drtune_ray.space.points import named_values, points
from drtune_ray.space.problems import Place, Problem
from drtune_ray.space.settings import normal_value, sections_with_rules
from drtune_ray.values import flattened, nested


@dataclass
class _Point:
    """A point at which the space is tried.

    Attributes:
        values: Every setting by its path, and the facts.
        inactive: Paths of the parameters that do not apply.
        unknown: Paths of the parameters whose value or condition cannot be computed.
    """

    values: dict[str, Any]
    inactive: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)

    def at(self, expression: Expression) -> str:
        """Describe the values that an expression reads."""
        names = sorted(expression.reads() | expression.facts())
        return _at({name: self.values[name] for name in names if name in self.values})


class SpaceCheck:
    """The checks of one space.

    Args:
        parameters: Parameters in an order in which each reads earlier ones only.
        constraints: Constraints of the space.
        base: The configuration that the space varies.
        facts: The known facts about the images.
        broken: Paths of parameters that could not be read; what depends on them is not checked.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        constraints: Sequence[Expression],
        base: TrialConfig,
        facts: Mapping[str, int],
        broken: frozenset[str] = frozenset(),
    ) -> None:
        self._base, self._values = base, flattened(base.to_mapping()) | dict(facts)
        self._all, self._broken = parameters, broken
        self._reads = {parameter.path: parameter.reads() for parameter in parameters}
        beyond = set(broken)
        for parameter in parameters:
            if not beyond.isdisjoint(self._reads[parameter.path]):
                beyond.add(parameter.path)
        self._sound = [p for p in parameters if p.path not in beyond]
        self._constraints = {c: c.reads() for c in constraints if beyond.isdisjoint(c.reads())}
        searched = {parameter.path for parameter in self._sound}
        self._ruled = [
            (section, leaves)
            for section, leaves in sections_with_rules()
            if not searched.isdisjoint(leaves.values())
        ]
        # The values of other parameters change nothing that is checked here.
        self._deciding = frozenset().union(
            *self._reads.values(),
            *self._constraints.values(),
            *(leaves.values() for _, leaves in self._ruled),
        )
        self._checked = [
            p for p in self._sound if p.path in self._deciding or p.when or p.expression
        ]
        self._named = named_values(self._sound, list(self._constraints), self._values)
        # What the points show: wrong expressions, conditions and constraints that can be true,
        # refused trials.
        self._wrong: dict[tuple[Place, str], Problem] = {}
        self._possible: dict[str | Expression, Mapping[str, Any]] = {}
        self._refused: dict[tuple[str, ...], Problem] = {}

    def problems(self) -> Iterator[Problem]:
        """Yield everything that is wrong."""
        if self._all and not self._broken and not any(p.is_sampled for p in self._all):
            sentence = "it searches nothing: it needs a float, int, choice or ordered parameter"
            yield Problem("nothing-searched", self._all[0].place, sentence)
        tried = self._points(self._deciding)
        for chosen in tried:
            self._try(chosen)
        conditional = {parameter.path for parameter in self._sound if parameter.when}
        for parameter in self._checked:
            # Only where its condition reads a parameter that applies at few of the random points.
            if parameter.path not in self._possible and conditional & parameter.when.reads():
                self._try_where_it_may_apply(parameter, tried[0])
        yield from self._wrong.values()
        yield from self._impossible()
        if not self._wrong:
            yield from self._refused.values()

    def _points(self, paths: frozenset[str]) -> list[dict[str, Any]]:
        sampled = [p for p in self._sound if p.is_sampled and p.path in paths]
        return points(sampled, self._named, self._values)

    def _try_where_it_may_apply(self, parameter: Parameter, near: Mapping[str, Any]) -> None:
        """Vary what a condition reads, from points at which the parameters that it reads apply."""
        reads = parameter.when.reads()
        for path in sorted(reads):
            near = {**near, **self._possible.get(path, {})}
        for chosen in self._points(reads):
            self._try({**near, **chosen})
            if parameter.path in self._possible:
                return

    # ---- one point

    def _try(self, chosen: Mapping[str, Any]) -> None:
        point = self._point(chosen)
        self._try_constraints(point, chosen)
        if not point.unknown:
            self._try_trial(point)

    def _point(self, chosen: Mapping[str, Any]) -> _Point:
        """Resolve a point, as far as it can be, and record what it shows of the parameters."""
        point = _Point(dict(self._values))
        for parameter in self._checked:
            expression = parameter.when.expression
            try:
                if not point.unknown.isdisjoint(self._reads[parameter.path]):
                    point.unknown.add(parameter.path)
                elif parameter.when.holds(point.values, point.inactive):
                    expression = parameter.expression
                    self._take(parameter, chosen, point)
                else:
                    point.inactive.add(parameter.path)
                    continue
            except UnknownFact:
                point.unknown.add(parameter.path)
            except ExpressionError as error:
                point.unknown.add(parameter.path)
                self._fails(expression, error, point)
            self._possible.setdefault(parameter.path, chosen)
        return point

    def _take(self, parameter: Parameter, chosen: Mapping[str, Any], point: _Point) -> None:
        path, expression = parameter.path, parameter.expression
        if parameter.is_sampled:
            value, refusal = chosen.get(path, self._values[path]), None
        else:
            value = parameter.derived(point.values)
            _, refusal = normal_value(path, value)
        if expression is not None and refusal:
            point.unknown.add(path)
            sentence = f"{expression.text!r}{point.at(expression)}: {refusal}"
            problem = Problem("expression-value", expression.place, sentence)
            self._wrong.setdefault((expression.place, expression.text), problem)
        else:
            point.values[path] = value

    def _try_constraints(self, point: _Point, chosen: Mapping[str, Any]) -> None:
        for constraint, reads in self._constraints.items():
            try:
                if point.unknown.isdisjoint(reads) and not constraint.holds(point.values):
                    continue
            except UnknownFact:
                pass
            except ExpressionError as error:
                self._fails(constraint, error, point)
            self._possible.setdefault(constraint, chosen)

    def _try_trial(self, point: _Point) -> None:
        """Check whether values that are valid by themselves make a valid trial."""
        if self._is_valid(point.values):
            return
        ruled = {path for _, leaves in self._ruled for path in leaves.values()}
        culprits = {p.path: p for p in self._sound if p.path in ruled}
        for path in list(culprits):
            fewer = {other: point.values[other] for other in culprits if other != path}
            if not self._is_valid(self._values | fewer):
                del culprits[path]
        values = {path: point.values[path] for path in culprits}
        try:
            self._base.with_values(values)
        except ConfigError as error:
            which = "one of them" if len(culprits) > 1 else "it"
            sentence = (
                f"{'; '.join(error.problems)}{_at(values)}: give {which} another range or a `when`"
            )
            place = max((p.place for p in culprits.values()), key=lambda place: place.line)
            problem = Problem("invalid-together", place, sentence)
            self._refused.setdefault(tuple(culprits), problem)

    def _is_valid(self, values: Mapping[str, Any]) -> bool:
        """Tell whether a trial keeps the rules between settings; fast, without the reason."""
        try:
            for section, leaves in self._ruled:
                section.model_validate(nested({leaf: values[leaves[leaf]] for leaf in leaves}))
        except ValidationError:
            return False
        return True

    # ---- problems

    def _fails(self, expression: Expression | None, error: ExpressionError, point: _Point) -> None:
        assert expression is not None
        sentence = f"{error}{point.at(expression)}"
        problem = Problem("expression-fails", expression.place, sentence)
        self._wrong.setdefault((expression.place, expression.text), problem)

    def _impossible(self) -> Iterator[Problem]:
        """Yield what was true at no point: conditions and constraints."""
        for parameter in self._checked:
            if parameter.path not in self._possible:
                own, reads = parameter.when.expression, parameter.when.reads()
                sentence = (
                    f"{parameter.path} never applies: {parameter.when} is true at none of the "
                    f"points tried ({self._described(reads, own)}): change the condition or the "
                    "ranges"
                )
                yield Problem("never-applies", own.place if own else parameter.place, sentence)
        for constraint, reads in self._constraints.items():
            if constraint not in self._possible:
                sentence = (
                    f"the constraint {constraint.text!r} holds at none of the points tried "
                    f"({self._described(reads, constraint)}): change it or the ranges"
                )
                yield Problem("never-holds", constraint.place, sentence)

    def _described(self, paths: frozenset[str], expression: Expression | None) -> str:
        """Describe what settings, and the facts in an expression, can be."""
        by_path = {parameter.path: parameter for parameter in self._sound}
        words = []
        for path in sorted(paths):
            parameter = by_path.get(path)
            if parameter is None:
                words.append(f"{path} is {self._values[path]!r}")
            elif parameter.expression is not None:
                words.append(f"{path} is {parameter.expression.text!r}")
            elif parameter.kind in RANGES:
                words.append(f"{path} is searched in {list(parameter.ends())}")
            else:
                words.append(f"{path} is one of {list(parameter.values)}")
        facts = expression.facts() if expression is not None else ()
        known = (fact for fact in sorted(facts) if fact in self._values)
        words += [f"{fact} is {self._values[fact]}" for fact in known]
        return ", ".join(words)


def cycle_problem(cycle: Sequence[Parameter]) -> Problem:
    """Report parameters that depend on each other."""
    chain = " -> ".join(parameter.path for parameter in (*cycle, cycle[0]))
    first = min(cycle, key=lambda parameter: parameter.place.line)
    sentence = f"{first.path} depends on itself: {chain}; remove one of these dependencies"
    return Problem("cycle", first.place, sentence)


def _at(values: Mapping[str, Any]) -> str:
    return "".join(
        f"{', ' if number else ' at '}{path}={value!r}"
        for number, (path, value) in enumerate(values.items())
    )
