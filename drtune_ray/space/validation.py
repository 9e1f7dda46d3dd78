"""Whether a space makes sense on the configuration that it varies.

The space is tried at its corners, see `space_corners`: does each parameter apply somewhere, can
each expression be computed, do the values make valid trials, can each constraint hold?
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations_with_replacement, product
from typing import Any

from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.space.corners import (
    MAX_POINTS,
    corners,
    corners_decide,
    needed_for,
    thresholds_in,
    tried_values,
)
from drtune_ray.space.expressions import Expression, ExpressionError, UnknownFact
from drtune_ray.space.parameters import ALWAYS, RANGES, Condition, Parameter, Resolved, resolve
from drtune_ray.space.problems import Problem
from drtune_ray.space.settings import group_of, normal_value
from drtune_ray.values import flattened


class SpaceCheck:
    """The checks of one space.

    Args:
        parameters: In an order in which each reads earlier ones only.
        constraints: Of the space.
        base: The configuration that it varies.
        facts: What is known of the images.
        broken: Paths of parameters that could not be read: what depends on them is not judged.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        constraints: Sequence[Expression],
        base: TrialConfig,
        facts: Mapping[str, int],
        broken: frozenset[str] = frozenset(),
    ) -> None:
        self._base, self._facts = base, facts
        self._values = flattened(base.to_mapping()) | dict(facts)
        self._all = list(parameters)
        self._broken = broken
        self._sound = [p for p in parameters if not self._is_beyond(p.reads() | {p.path})]
        self._constraints = [c for c in constraints if not self._is_beyond(c.reads())]
        self._found: dict[str, Resolved | None] = {}

    def problems(self) -> Iterator[Problem]:
        """Everything that is wrong."""
        is_sampled = any(parameter.is_sampled for parameter in self._all)
        if self._all and not is_sampled and not self._broken:
            sentence = "it searches nothing: it needs a float, int, choice or ordered parameter"
            yield Problem("nothing-searched", self._all[0].place, sentence)
        failing: set[Expression] = set()
        for parameter in self._sound:
            for expression in _expressions_of([parameter]):
                if parameter.when.expression not in failing:
                    yield from self._failure(expression, parameter, failing)
            if parameter.expression is not None and parameter.expression not in failing:
                yield from self._bad_results(parameter, failing)
        for constraint in self._constraints:
            yield from self._failure(constraint, None, failing)
        for parameter in self._sound:
            if parameter.when.expression not in failing:
                yield from self._never_applies(parameter)
        for constraint in self._constraints:
            if constraint not in failing:
                yield from self._never_holds(constraint)
        if not failing:
            yield from self._invalid_together()

    def _is_beyond(self, paths: frozenset[str]) -> bool:
        """Whether something depends on a parameter that could not be read."""
        needed = paths.union(*(p.reads() | {p.path} for p in needed_for(self._all, paths)))
        return bool(needed & self._broken)

    def _corners(
        self, paths: frozenset[str], *expressions: Expression, condition: Condition = ALWAYS
    ) -> Iterator[Resolved]:
        """Points that differ in what decides some paths; none while that needs unknown facts.

        Args:
            paths: Of settings.
            expressions: To be judged at the points.
            condition: The same.
        """
        needed = needed_for(self._sound, paths)
        cuts = thresholds_in(
            (*_expressions_of(needed), *expressions, *filter(None, [condition.expression])),
            (*(parameter.when for parameter in needed), condition),
            self._facts,
        )
        try:
            yield from corners(needed, self._values, cuts)
        except UnknownFact:
            return

    # ---- expressions

    def _failure(
        self, expression: Expression, parameter: Parameter | None, failing: set[Expression]
    ) -> Iterator[Problem]:
        """Where an expression, of a parameter or a constraint, cannot be computed."""
        paths = parameter.reads() if parameter else expression.reads()
        for point in self._corners(paths, expression):
            try:
                if parameter is None:
                    expression.holds(point.values)
                elif parameter.when.holds(point.values, point.inactive):
                    if expression is parameter.expression:
                        parameter.derived(point.values)
            except UnknownFact:
                continue
            except ExpressionError as error:
                failing.add(expression)
                sentence = f"{error}{_at(_read_by(expression, point))}"
                yield Problem("expression-fails", expression.place, sentence)
                return

    def _bad_results(self, parameter: Parameter, failing: set[Expression]) -> Iterator[Problem]:
        """Where an expression gives a value that its setting does not take."""
        assert parameter.expression is not None
        for point in self._corners(frozenset({parameter.path})):
            if parameter.path not in point.taken:
                continue
            _, problem = normal_value(parameter.path, point.taken[parameter.path])
            if problem:
                failing.add(parameter.expression)
                at = _at(_read_by(parameter.expression, point))
                sentence = f"{parameter.expression.text!r}{at}: {problem}"
                yield Problem("expression-value", parameter.expression.place, sentence)
                return

    # ---- what can never be

    def _never_applies(self, parameter: Parameter) -> Iterator[Problem]:
        condition, reads = parameter.when, parameter.when.reads()
        if self._somewhere(parameter) is not None:
            return
        needed = needed_for(self._sound, reads)
        points = self._corners(reads, condition=condition)
        if _are_all(points, lambda point: condition.holds(point.values, point.inactive)) and (
            corners_decide(condition.expression, _expressions_of(needed), needed, self._facts)
        ):
            own = [condition.expression] if condition.expression is not None else []
            sentence = (
                f"{parameter.path} never applies: nothing that is searched or set makes "
                f"{condition} true ({self._described(reads, own)})"
            )
            yield Problem("never-applies", own[0].place if own else parameter.place, sentence)

    def _never_holds(self, constraint: Expression) -> Iterator[Problem]:
        paths = constraint.reads()
        if any(_keeps(constraint, point) for point in self._corners(paths, constraint)):
            return
        needed = needed_for(self._sound, paths)
        points = self._corners(paths, constraint)
        if _are_all(points, lambda point: constraint.holds(point.values)) and corners_decide(
            constraint, _expressions_of(needed), needed, self._facts
        ):
            sentence = f"no trial can keep the constraint {constraint.text!r}"
            yield Problem(
                "never-holds",
                constraint.place,
                f"{sentence} ({self._described(paths, [constraint])})",
            )

    def _somewhere(self, parameter: Parameter) -> Resolved | None:
        """A corner at which a parameter applies."""
        if parameter.path not in self._found:
            points = self._corners(parameter.when.reads(), condition=parameter.when)
            found = next((point for point in points if _applies(parameter, point)), None)
            self._found[parameter.path] = found
        return self._found[parameter.path]

    def _described(self, paths: frozenset[str], expressions: Sequence[Expression]) -> str:
        """What settings, and the facts in some expressions, can be."""
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
        facts = frozenset().union(*(expression.facts() for expression in expressions))
        words += [f"{fact} is {self._values[fact]}" for fact in sorted(facts)]
        return ", ".join(words)

    # ---- whole trials

    def _invalid_together(self) -> Iterator[Problem]:
        """Values that are valid by themselves but make no valid trial."""
        said: set[str] = set()
        for first, second in self._pairs():
            for values in product(tried_values(first), tried_values(second)):
                chosen = {first.path: values[0], second.path: values[1]}
                point = self._trial_with(first, second, chosen)
                reason = point and self._refusal(point)
                if point and reason and reason not in said:
                    said.add(reason)
                    at = _at({path: point.values[path] for path in chosen})
                    sentence = f"{reason}{at}: give one of them another range or a `when`"
                    place = max(first.place, second.place, key=lambda place: place.line)
                    yield Problem("invalid-together", place, sentence)

    def _pairs(self) -> Iterator[tuple[Parameter, Parameter]]:
        """Settings of one group, in pairs: rules of `TrialConfig` hold within a group."""
        fixed = [p for p in self._sound if p.expression is None]
        for first, second in combinations_with_replacement(fixed, 2):
            if group_of(first.path) == group_of(second.path):
                yield first, second

    def _refusal(self, point: Resolved) -> str | None:
        """Why a trial is refused."""
        try:
            self._base.with_values(point.taken)
        except ConfigError as error:
            return "; ".join(error.problems)
        return None

    def _trial_with(
        self, first: Parameter, second: Parameter, chosen: Mapping[str, Any]
    ) -> Resolved | None:
        """A trial with the chosen values, as far as both apply at once; None if none is found."""
        wanted: dict[str, Any] = {}
        for parameter in (first, second):
            place = self._somewhere(parameter)
            if place is None:
                return None
            wanted |= place.taken
        wanted |= chosen

        def value_of(parameter: Parameter) -> Any:
            value = wanted.get(parameter.path, self._values[parameter.path])
            return value if parameter.holds(value) else parameter.ends()[0]

        try:
            return resolve(self._sound, self._values, value_of)
        except ConfigError:  # a problem of its own
            return None


def cycle_problem(cycle: Sequence[Parameter]) -> Problem:
    """Parameters that depend on each other."""
    chain = " -> ".join(parameter.path for parameter in (*cycle, cycle[0]))
    first = min(cycle, key=lambda parameter: parameter.place.line)
    sentence = f"{first.path} depends on itself: {chain}; remove one of these dependencies"
    return Problem("cycle", first.place, sentence)


def _are_all(points: Iterable[Resolved], judge: Callable[[Resolved], bool]) -> bool:
    """Whether these are all corners, and each gives an answer."""
    count = 0
    for point in points:
        count += 1
        try:
            judge(point)
        except (ExpressionError, UnknownFact):
            return False
    return 0 < count <= MAX_POINTS


def _applies(parameter: Parameter, point: Resolved) -> bool:
    try:
        return parameter.when.holds(point.values, point.inactive)
    except (ExpressionError, UnknownFact):
        return False


def _keeps(constraint: Expression, point: Resolved) -> bool:
    try:
        return constraint.holds(point.values)
    except (ExpressionError, UnknownFact):
        return False


def _expressions_of(parameters: Sequence[Parameter]) -> list[Expression]:
    found = [parameter.when.expression for parameter in parameters]
    found += [parameter.expression for parameter in parameters]
    return [expression for expression in found if expression is not None]


def _read_by(expression: Expression, point: Resolved) -> dict[str, Any]:
    names = sorted(expression.reads() | expression.facts())
    return {name: point.values[name] for name in names if name in point.values}


def _at(values: Mapping[str, Any]) -> str:
    return "".join(
        f"{', ' if number else ' at '}{path}={value!r}"
        for number, (path, value) in enumerate(values.items())
    )
