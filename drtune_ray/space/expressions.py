"""Expressions between settings: ``0.5 * method.bank_size / training.batch_size``.

An expression uses Python's arithmetic and comparisons over the paths of `TrialConfig` and the facts
of `FACTS`. simpleeval computes it, once `expression_problems` has found nothing else in it.
"""

from __future__ import annotations

import ast
import math
import operator
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import simpleeval

from drtune_ray.errors import ConfigError
from drtune_ray.space.expression_syntax import (
    FUNCTIONS,
    ORDERS,
    literals_in,
    names_in,
    settings_in,
    tree_of,
)
from drtune_ray.space.problems import Place
from drtune_ray.space.settings import FACTS

MAX_EXPONENT = 100
# The smallest violation of a constraint: a < b with a = b does not hold though nothing differs.
LEAST_VIOLATION = 1e-6


class ExpressionError(ConfigError):
    """An expression cannot be computed for some values."""


class UnknownFact(ConfigError):
    """A fact about the images is not known yet."""


class _Inactive(Exception):
    """A setting is not searched in this trial."""


@dataclass(frozen=True)
class Expression:
    """An expression that passed :func:`expression_problems`.

    Attributes:
        text: Text that the user wrote.
        place: Place of its declaration.
    """

    text: str
    place: Place = field(default=Place(), compare=False, repr=False)

    def reads(self) -> frozenset[str]:
        """Return the paths of the settings in it."""
        return settings_in(tree_of(self.text))

    def facts(self) -> frozenset[str]:
        """Return the facts in it."""
        return names_in(tree_of(self.text)) & FACTS.keys()

    def literals(self) -> frozenset[Any]:
        """Return the numbers and words in it."""
        return literals_in(tree_of(self.text))

    def evaluate(self, values: Mapping[str, Any]) -> Any:
        """Return its value.

        Args:
            values: Every setting by its path, and the facts.

        Raises:
            ExpressionError: If it has no value, for example at a division by zero.
            UnknownFact: If it uses a fact that `values` lack.
        """
        return self._computed(tree_of(self.text), values, frozenset())

    def holds(self, values: Mapping[str, Any], inactive: Collection[str] = ()) -> bool:
        """Return whether it is true; what depends on an inactive setting is not.

        The logic has three values: ``a or b`` is true if ``b`` is, even if ``a`` is inactive.

        Args:
            values: Every setting by its path, and the facts.
            inactive: Paths of the parameters that do not apply.

        Raises:
            ExpressionError: If it is neither true nor false.
            UnknownFact: If it uses a fact that `values` lack.
        """
        try:
            value = self._computed(tree_of(self.text), values, inactive)
        except _Inactive:
            return False
        if not isinstance(value, bool):
            raise ExpressionError(f"{self.text!r} gives {value!r}, neither true nor false")
        return value

    def violation(self, values: Mapping[str, Any]) -> float:
        """Return how far it is from being true: 0.0 if it is true, otherwise above 0.

        Comparisons of numbers by <, <=, >, >= give their largest difference divided by the larger
        magnitude of the two sides; anything else gives 1.0.

        Raises:
            ExpressionError: If it is neither true nor false.
            UnknownFact: If it uses a fact that `values` lack.
        """
        if self.holds(values):
            return 0.0
        tree = tree_of(self.text)
        if not isinstance(tree, ast.Compare) or not all(isinstance(op, ORDERS) for op in tree.ops):
            return 1.0
        sides = [
            self._computed(side, values, frozenset()) for side in (tree.left, *tree.comparators)
        ]
        if not all(isinstance(side, int | float) for side in sides):
            return 1.0
        excesses = [
            _excess(op, left, right)
            for op, left, right in zip(tree.ops, sides, sides[1:], strict=False)
        ]
        return max(LEAST_VIOLATION, *excesses)

    def _computed(
        self, node: ast.expr, values: Mapping[str, Any], inactive: Collection[str]
    ) -> Any:
        evaluator = _Evaluator(_Names(values, inactive))
        try:
            value = evaluator.eval(self.text, previously_parsed=node)
        except (ArithmeticError, ValueError, TypeError, simpleeval.InvalidExpression) as error:
            if isinstance(error, ConfigError):
                raise
            raise ExpressionError(f"{self.text!r} cannot be computed: {error}") from None
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ExpressionError(
                f"{self.text!r} cannot be computed: it gives a number above 1e308"
            )
        if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
            raise ExpressionError(f"{self.text!r} cannot be computed: it gives {value}")
        return value


def _excess(op: ast.cmpop, left: float, right: float) -> float:
    difference = left - right if isinstance(op, ast.Lt | ast.LtE) else right - left
    return difference / (max(abs(left), abs(right)) or 1.0)


class _Names:
    """The values of names, in the form that simpleeval reads."""

    def __init__(self, values: Mapping[str, Any], inactive: Collection[str]) -> None:
        self._values, self._inactive = values, inactive

    def __getitem__(self, name: str) -> Any:
        if name in self._inactive:
            raise _Inactive(name)
        if name not in self._values and name in FACTS:
            raise UnknownFact(f"{name} is not known before the images were read")
        return self._values[name]


class _Evaluator(simpleeval.EvalWithCompoundTypes):  # type: ignore[misc]
    """simpleeval with our functions, limits of numbers, and three-valued and/or.

    Arithmetic takes numbers alone: repeated texts and lists would grow without a limit.
    """

    def __init__(self, names: _Names) -> None:
        super().__init__(names=names)
        self.functions = FUNCTIONS | {"round": _rounded}
        self.operators |= ARITHMETIC

    def _eval_boolop(self, node: ast.BoolOp) -> Any:
        deciding = isinstance(node.op, ast.Or)
        inactive, value = None, None
        for part in node.values:
            try:
                value = self._eval(part)
            except _Inactive as error:
                inactive = error
                continue
            if bool(value) is deciding:
                return value
        if inactive:
            raise inactive
        return value


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > MAX_EXPONENT:  # simpleeval's own limit lets seconds of work through
        raise simpleeval.NumberTooHigh(f"the exponent {exponent} is above {MAX_EXPONENT}")
    return simpleeval.safe_power(base, exponent)


def _rounded(number: Any, digits: Any = None) -> Any:
    if digits is not None and abs(digits) > MAX_EXPONENT:  # 10**30_000_000 takes minutes
        raise simpleeval.NumberTooHigh(f"round to {digits} digits is beyond {MAX_EXPONENT}")
    return round(number, digits)


def _of_numbers(compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def checked(left: Any, right: Any) -> Any:
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise TypeError("arithmetic takes numbers")
        return compute(left, right)

    return checked


ARITHMETIC = {
    ast.Add: _of_numbers(operator.add),
    ast.Sub: _of_numbers(operator.sub),
    ast.Mult: _of_numbers(operator.mul),
    ast.Div: _of_numbers(operator.truediv),
    ast.FloorDiv: _of_numbers(operator.floordiv),
    ast.Mod: _of_numbers(operator.mod),
    ast.Pow: _of_numbers(_power),
}
