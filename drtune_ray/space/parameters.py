"""The parameters of a search space: their values, their conditions, how Optuna draws them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from drtune_ray.space.expressions import Expression
from drtune_ray.space.problems import Place

if TYPE_CHECKING:
    import optuna


Kind = Literal["float", "int", "choice", "ordered", "constant", "expression"]
RANGES: tuple[Kind, ...] = ("float", "int")
CATEGORIES: tuple[Kind, ...] = ("choice", "ordered")
SAMPLED: tuple[Kind, ...] = (*RANGES, *CATEGORIES)
KINDS: tuple[Kind, ...] = (*SAMPLED, "constant", "expression")


@dataclass(frozen=True)
class Condition:
    """The condition under which a parameter applies; an empty one always holds.

    Attributes:
        values: Pairs of a path and its allowed values; each path must have one of its values.
        expression: Expression that must be true; replaces `values`.
    """

    values: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    expression: Expression | None = None

    def __bool__(self) -> bool:
        return bool(self.values) or self.expression is not None

    def __str__(self) -> str:
        if self.expression is not None:
            return repr(self.expression.text)
        return " and ".join(
            f"{path} = {' or '.join(map(repr, values))}" for path, values in self.values
        )

    def reads(self) -> frozenset[str]:
        """Return the paths of the settings that it depends on."""
        if self.expression is not None:
            return self.expression.reads()
        return frozenset(path for path, _ in self.values)

    def holds(self, values: Mapping[str, Any], inactive: Collection[str] = ()) -> bool:
        """Return whether it is true; a condition on an inactive parameter is not.

        Args:
            values: Every setting by its path, and the facts.
            inactive: Paths of the parameters that do not apply.

        Raises:
            ExpressionError: If its expression cannot be computed.
            UnknownFact: If its expression uses a fact that `values` lack.
        """
        if self.expression is not None:
            return self.expression.holds(values, inactive)
        return all(
            path not in inactive and values[path] in allowed for path, allowed in self.values
        )

    def to_plain(self) -> Any:
        """Return the plain value that YAML holds."""
        if self.expression is not None:
            return self.expression.text
        return {path: v[0] if len(v) == 1 else list(v) for path, v in self.values}


ALWAYS = Condition()


@dataclass(frozen=True)
class Parameter:
    """A setting of `TrialConfig` in a search space.

    Attributes:
        path: Dotted path of the setting.
        kind: One of `KINDS`.
        bounds: Lowest and highest value; for ``float`` and ``int``.
        values: Categories, for ``ordered`` from first to last; the single value of ``constant``.
        log: Whether values are drawn uniformly in the logarithm.
        step: Distance between neighbouring values, counted from the lowest; None if continuous.
        when: Condition under which it applies; otherwise the setting keeps its value in the base.
        expression: Expression that computes the value; for ``expression``.
        place: Place of its declaration.
    """

    path: str
    kind: Kind
    bounds: tuple[float, float] = (0.0, 0.0)
    values: tuple[Any, ...] = ()
    log: bool = False
    step: float | None = None
    when: Condition = ALWAYS
    expression: Expression | None = None
    place: Place = field(default=Place(), compare=False, repr=False)

    @property
    def is_sampled(self) -> bool:
        """Whether Optuna draws it; a constant or an expression follows from the rest."""
        return self.kind in SAMPLED

    @property
    def name(self) -> str:
        """Its name in the Optuna study: the path; for ``ordered`` followed by the values.

        Optuna has no ordered categories, so their index, from 0, is drawn as an int: the sampler
        sees which values are neighbours, and the name tells what each index means.
        """
        if self.kind == "ordered":
            return f"{self.path} [{', '.join(map(str, self.values))}]"
        return self.path

    def ends(self) -> tuple[Any, ...]:
        """Return both ends of a range, or every category."""
        if self.kind in RANGES:
            return tuple(int(end) if self.kind == "int" else end for end in self.bounds)
        return self.values

    def expressions(self) -> list[Expression]:
        """Return the expressions of its condition and of its value."""
        return [each for each in (self.when.expression, self.expression) if each is not None]

    def reads(self) -> frozenset[str]:
        """Return the paths of the settings that it depends on."""
        own = self.expression.reads() if self.expression else frozenset()
        return self.when.reads() | own

    def suggest(self, trial: optuna.Trial) -> Any:
        """Return a value from Optuna."""
        low, high = self.bounds
        if self.kind == "ordered":
            return self.values[trial.suggest_int(self.name, 0, len(self.values) - 1)]
        if self.kind == "choice":
            return trial.suggest_categorical(self.name, self.values)
        if self.kind == "int":
            return trial.suggest_int(
                self.name, int(low), int(high), log=self.log, step=int(self.step or 1)
            )
        return trial.suggest_float(self.name, low, high, log=self.log, step=self.step)

    def stored(self, value: Any) -> Any:
        """Return a value in the form that the Optuna study holds."""
        return self.values.index(value) if self.kind == "ordered" else value

    def derived(self, values: Mapping[str, Any]) -> Any:
        """Return the value of a ``constant`` or ``expression``.

        Args:
            values: Every setting by its path, and the facts.

        Raises:
            ExpressionError: If the expression cannot be computed.
            UnknownFact: If it uses a fact that `values` lack.
        """
        return self.expression.evaluate(values) if self.expression else self.values[0]

    def holds(self, value: Any) -> bool:
        """Return whether it can draw a value; an ``expression`` draws none."""
        if self.kind not in RANGES:
            return value in self.values
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.bounds[0] <= value <= self.bounds[1]:
            return False
        distance = (value - self.bounds[0]) / (self.step or 1)
        is_on_step = abs(distance - round(distance)) < 1e-9
        return is_on_step if self.step or self.kind == "int" else True

    def to_plain(self) -> dict[str, Any]:
        """Return the plain value that YAML holds below its path."""
        content: Any = list(self.ends())
        if self.kind == "constant":
            content = self.values[0]
        if self.expression is not None:
            content = self.expression.text
        plain: dict[str, Any] = {self.kind: content}
        if self.log:
            plain["log"] = True
        if self.step is not None:
            plain["step"] = int(self.step) if self.kind == "int" else self.step
        if self.when:
            plain["when"] = self.when.to_plain()
        return plain


def path_of(name: str) -> str:
    """Return the path of a parameter from its name in the Optuna study, see `Parameter.name`."""
    return name.partition(" ")[0]


@dataclass(frozen=True)
class Resolved:
    """A point of a search space.

    Attributes:
        values: Every setting by its path, and the facts.
        taken: Value of each active parameter, by path.
        inactive: Paths of the parameters that do not apply.
    """

    values: Mapping[str, Any]
    taken: Mapping[str, Any]
    inactive: frozenset[str]


def resolve(
    parameters: Iterable[Parameter],
    values: Mapping[str, Any],
    sampled: Callable[[Parameter], Any],
) -> Resolved:
    """Give each active parameter its value, in order of dependency.

    Args:
        parameters: Parameters in an order in which each reads earlier ones only.
        values: Every setting of the base by its path, and the facts.
        sampled: Function that returns the value of a sampled parameter.

    Raises:
        ExpressionError: If an expression cannot be computed.
        UnknownFact: If it uses a fact that `values` lack.
    """
    all_values, taken = dict(values), {}
    inactive: set[str] = set()
    for parameter in parameters:
        if not parameter.when.holds(all_values, inactive):
            inactive.add(parameter.path)
            continue
        value = sampled(parameter) if parameter.is_sampled else parameter.derived(all_values)
        all_values[parameter.path] = taken[parameter.path] = value
    return Resolved(all_values, taken, frozenset(inactive))


def in_order(
    parameters: Sequence[Parameter],
) -> tuple[list[Parameter], list[list[Parameter]]]:
    """Return parameters after those that they depend on, otherwise as declared; and the cycles."""
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
    """Return a cycle among parameters each of which depends on another of them."""
    by_path = {parameter.path: parameter for parameter in parameters}
    walk = [parameters[0]]
    while True:
        following = by_path[min(walk[-1].reads() & by_path.keys())]
        if following in walk:
            return walk[walk.index(following) :]
        walk.append(following)
