"""Parse the plain content of a search space: form, names, ranges and values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from drtune_ray.config.section import unknown_name
from drtune_ray.space.expression_syntax import expression_problems
from drtune_ray.space.expressions import Expression
from drtune_ray.space.parameters import (
    ALWAYS,
    CATEGORIES,
    KINDS,
    RANGES,
    Condition,
    Kind,
    Parameter,
)
from drtune_ray.space.problems import Place, Problem, place_below
from drtune_ray.space.settings import normal_value, restriction_of, setting_paths

PARAMETERS, CONSTRAINTS = "parameters", "constraints"
KEYS = (PARAMETERS, CONSTRAINTS)
OPTIONS: dict[str, tuple[str, ...]] = {
    kind: ("log", "step", "when") if kind in RANGES else ("when",) for kind in KINDS
}


@dataclass
class Reading:
    """The part of a search space that could be parsed.

    Attributes:
        parameters: Parameters without a problem, as declared.
        constraints: Constraints without a problem.
        broken: Paths of the other parameters.
        problems: Problems found.
    """

    parameters: list[Parameter] = field(default_factory=list)
    constraints: list[Expression] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def read_content(content: Mapping[str, Any]) -> Reading:
    """Parse every parameter and constraint, whatever is wrong with the others."""
    reading = Reading()
    for key in content:
        if key not in KEYS:
            sentence = unknown_name("key of the search space", str(key), KEYS)
            place = place_below(content, key, Place())
            reading.problems.append(Problem("space-key", place, sentence))
    _read_parameters(content, reading)
    _read_constraints(content, reading)
    return reading


def _read_parameters(content: Mapping[str, Any], reading: Reading) -> None:
    declared = content.get(PARAMETERS)
    if not isinstance(declared, Mapping) or not declared:
        place = place_below(content, PARAMETERS, Place(getattr(content, "source", ""), 1))
        sentence = f"it needs {PARAMETERS!r}: a mapping of paths to ranges"
        reading.problems.append(Problem("no-parameters", place, sentence))
        return
    for rank, (path, body) in enumerate(declared.items(), start=1):
        place = place_below(declared, path, Place(line=rank))
        parameter, problems = _read_parameter(str(path), body, place)
        if parameter is None or problems:
            reading.broken.add(str(path))
            reading.problems += problems
        else:
            reading.parameters.append(parameter)


def _read_constraints(content: Mapping[str, Any], reading: Reading) -> None:
    texts, declared = content.get(CONSTRAINTS) or [], content.get(PARAMETERS)
    num_before = len(declared) if isinstance(declared, Mapping) else 0
    place = place_below(content, CONSTRAINTS, Place(line=num_before + 1))
    if not isinstance(texts, list):
        sentence = f"{CONSTRAINTS} must be a list of expressions, but got {texts!r}"
        reading.problems.append(Problem("constraints-list", place, sentence))
        return
    for index, text in enumerate(texts):
        here = place_below(texts, index, replace(place, line=place.line + index))
        problems = list(expression_problems(text, here))
        if text in [known.text for known in reading.constraints]:
            sentence = f"the constraint {text!r} stands twice: remove one of them"
            problems.append(Problem("constraint-twice", here, sentence))
        if not problems:
            reading.constraints.append(Expression(text, here))
        reading.problems += problems


def _read_parameter(path: str, body: Any, place: Place) -> tuple[Parameter | None, list[Problem]]:
    """Return a parameter of the right form, and the problems that it has by itself."""
    if problems := list(_path_problems(path, place)):
        return None, problems
    kinds = [kind for kind in get_args(Kind) if isinstance(body, Mapping) and kind in body]
    if len(kinds) != 1:
        example = _example(path, body)
        sentence = f"{path} needs exactly one of {list(KINDS)}, but got {body!r}; write for example"
        return None, [Problem("one-kind", place, f"{sentence} {example}")]
    kind = kinds[0]
    for key in body:
        if key != kind and key not in OPTIONS[kind]:
            sentence = f"unknown key {key!r} in {path}; valid are {[kind, *OPTIONS[kind]]}"
            problems.append(Problem("option", place_below(body, key, place), sentence))
    restriction = restriction_of(path)
    if restriction is not None and kind not in restriction.kinds:
        problems.append(Problem("restricted", place, f"{path} {restriction.reason}"))
    content_place = place_below(body, kind, place)
    when, when_problems = _read_condition(path, body.get("when"), place_below(body, "when", place))
    if kind in RANGES:
        parameter, range_problems = _read_range(path, kind, body, content_place)
    else:
        parameter, range_problems = _read_values(path, kind, body[kind], content_place)
    problems += [*when_problems, *range_problems]
    if parameter is None or problems:
        return None, problems
    return replace(parameter, when=when, place=place), []


def _path_problems(path: str, place: Place) -> Iterator[Problem]:
    paths = setting_paths()
    if any(other.startswith(f"{path}.") for other in paths):
        sentence = f"{path} is a group of settings: search a setting below it"
        yield Problem("group", place, sentence)
    elif path not in paths:
        yield Problem("setting", place, unknown_name("key", path, paths))


def _example(path: str, body: Any) -> str:
    if isinstance(body, Mapping):
        return f"{path}: {{float: [0.1, 1.0]}}"
    return f"{path}: {{{'choice' if isinstance(body, list) else 'constant'}: {body}}}"


# ---- ranges


def _read_range(
    path: str, kind: Kind, body: Mapping[str, Any], place: Place
) -> tuple[Parameter | None, list[Problem]]:
    given, log, step = body[kind], body.get("log", False), body.get("step")
    problems: list[Problem] = []
    bounds = [_number(end) for end in given] if isinstance(given, list) else []
    if len(bounds) != 2 or None in bounds:
        sentence = f"{path} needs [low, high], but got {given!r}"
        problems.append(Problem("bounds", place, sentence))
    if not isinstance(log, bool):
        sentence = f"{path} needs log: true or false, but got {log!r}"
        problems.append(Problem("log-word", place_below(body, "log", place), sentence))
    if step is not None and _number(step) is None:
        sentence = f"{path} needs a number as step, but got {step!r}"
        problems.append(Problem("step-number", place_below(body, "step", place), sentence))
    if problems:
        return None, problems
    low, high = bounds
    assert low is not None and high is not None
    step = None if step is None else _number(step)
    parameter = Parameter(path, kind, (low, high), log=log, step=step)
    problems = list(_range_problems(parameter, place))
    return parameter, problems or list(_end_problems(parameter, place))


def _number(value: Any) -> float | None:
    """Return a finite number; YAML reads 1e-4 as text, which is converted."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _range_problems(parameter: Parameter, place: Place) -> Iterator[Problem]:
    path, (low, high), step = parameter.path, parameter.bounds, parameter.step
    is_int = parameter.kind == "int"
    if low > high:
        sentence = f"{path} has an empty range: low <= high must hold in [{low}, {high}]"
        yield Problem("empty-range", place, sentence)
    if parameter.log and low <= 0:
        sentence = f"{path} is logarithmic: low > 0 must hold, but got low={low}"
        yield Problem("log-of-nothing", place, sentence)
    if parameter.log and step is not None:
        yield Problem("log-and-step", place, f"{path} has both log and step: choose one")
    if is_int and any(end != int(end) for end in parameter.bounds):
        sentence = f"{path} is an int: both bounds must be whole, got [{low}, {high}]"
        yield Problem("whole-bounds", place, sentence)
    elif step is not None and (step <= 0 or (is_int and step != int(step))):
        sentence = f"{path} needs a step above 0, whole for an int, but got step={step:g}"
        yield Problem("step", place, sentence)
    elif step is not None and low <= high and not parameter.holds(high):
        sentence = (
            f"{path} does not end on a step: {high:g} is not {low:g} plus a multiple of {step:g}"
        )
        yield Problem("step-end", place, sentence)


def _end_problems(parameter: Parameter, place: Place) -> Iterator[Problem]:
    """Yield what is wrong if the setting refuses an end, or values between the ends."""
    path, (low, high) = parameter.path, parameter.bounds
    found = [normal_value(path, end) for end in dict.fromkeys(parameter.ends())]
    for value, problem in found:
        if problem:
            yield Problem("range-value", place, problem)
        elif isinstance(value, bool):
            sentence = f"{path} is true or false: write {path}: {{choice: [true, false]}}"
            yield Problem("range-of-words", place, sentence)
            return
    if parameter.kind == "int" or any(problem for _, problem in found):
        return
    between = low + (parameter.step or 0.381966 * (high - low))
    if low < between <= high and normal_value(path, between)[1]:
        sentence = f"{path} takes whole numbers: write int instead of float"
        yield Problem("float-for-int", place, sentence)


# ---- values


def _read_values(
    path: str, kind: Kind, given: Any, place: Place
) -> tuple[Parameter | None, list[Problem]]:
    if kind == "expression":
        problems = list(expression_problems(given, place))
        return Parameter(path, kind, expression=Expression(given, place)), problems
    if kind in CATEGORIES and (not isinstance(given, list) or not given):
        sentence = f"{path} needs a list of values, but got {given!r}"
        return None, [Problem("values-list", place, sentence)]
    items = list(given) if kind in CATEGORIES else [given]
    values, problems = [], []
    for index, item in enumerate(items):
        here = place_below(given, index, place) if kind in CATEGORIES else place
        value, problem = normal_value(path, item)
        if problem:
            problems.append(Problem("value", here, problem))
        elif value in values:
            sentence = f"{path} has the value {value!r} twice: remove one of them"
            problems.append(Problem("value-twice", here, sentence))
        values.append(value)
    return Parameter(path, kind, values=tuple(values)), problems


# ---- conditions


def _read_condition(path: str, given: Any, place: Place) -> tuple[Condition, list[Problem]]:
    if given is None:
        return ALWAYS, []
    if isinstance(given, str):
        problems = list(expression_problems(given, place))
        return Condition(expression=None if problems else Expression(given, place)), problems
    if not isinstance(given, Mapping) or not given:
        sentence = (
            f"{path} needs when: {{PATH: VALUE}}, when: {{PATH: [VALUE, ...]}} or an expression in "
            f"quotes, but got when={given!r}"
        )
        return ALWAYS, [Problem("condition", place, sentence)]
    values, problems = [], []
    for key, value in given.items():
        here = place_below(given, key, place)
        allowed = list(value) if isinstance(value, list) else [value]
        found = list(_allowed_problems(path, str(key), allowed, here))
        problems += found
        if not found:
            values.append((str(key), tuple(allowed)))
    return Condition(tuple(values)), problems


def _allowed_problems(path: str, key: str, allowed: list[Any], place: Place) -> Iterator[Problem]:
    if key not in setting_paths():
        yield Problem("condition-setting", place, unknown_name("key", key, setting_paths()))
        return
    if not allowed:
        sentence = f"{path} never applies: {key} has no value in its condition"
        yield Problem("condition-empty", place, sentence)
    for value in allowed:
        taken, problem = normal_value(key, value)
        is_same = taken == value and isinstance(taken, bool) == isinstance(value, bool)
        if problem is None and not is_same:
            problem = f"{path} never applies: {key} is never {value!r}; write {taken!r}"
        if problem:
            yield Problem("condition-value", place, problem)
