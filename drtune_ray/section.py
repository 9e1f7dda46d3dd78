"""A group of settings that refuses what it does not know, in sentences with the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from drtune_ray.errors import ConfigError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


def _workers(value: Any) -> int | tuple[int, int]:
    """A number of workers, or the least and the most of them."""
    bounds = list(value) if isinstance(value, list | tuple) else [value]
    are_counts = all(type(bound) is int and bound >= 1 for bound in bounds)
    if not are_counts or len(bounds) > 2 or bounds != sorted(bounds) or not bounds:
        raise ValueError(
            f"workers must be a number from 1, or [min, max] of them, but got {value!r}"
        )
    return bounds[0] if bounds[0] == bounds[-1] else (bounds[0], bounds[1])


Workers = Annotated[int | tuple[int, int], BeforeValidator(_workers)]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def validated(section: type[S], values: Mapping[str, Any], prefix: str = "") -> S:
    """Build a section, turning pydantic's errors into one `ConfigError`.

    Args:
        section: Its class.
        values: Nested plain values.
        prefix: Goes before each path in the messages.
    """
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors()
        raise ConfigError(_sentence(section, problem, prefix) for problem in problems) from None


def _sentence(section: type[Section], problem: Any, prefix: str) -> str:
    # Union members and validators appear in the location; only real keys are shown.
    known = set(known_paths(section))
    keys: list[str] = []
    for part in problem["loc"]:
        if problem["type"] == "extra_forbidden" or ".".join([*keys, str(part)]) in known:
            keys.append(str(part))
    path = prefix + ".".join(keys)
    if problem["type"] == "extra_forbidden":
        return unknown_name("key", path, [prefix + name for name in sorted(known)])
    if problem["type"] == "missing":
        return f"{path} is missing: give it a value"
    if problem["type"] == "value_error":
        prefix = f"{path}: " if path else ""
        return prefix + str(problem["ctx"]["error"])
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{path}={problem['input']!r} is not valid: {message}"


def unknown_name(what: str, value: str, valid: Iterable[str]) -> str:
    """A sentence about a name that is not among the valid ones, with the nearest of them."""
    valid = list(valid)
    nearest = difflib.get_close_matches(value, valid, n=1, cutoff=0.5)
    if not nearest:
        leaf = value.rsplit(".", 1)[-1]
        nearest = [path for path in valid if path.rsplit(".", 1)[-1] == leaf][:1]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; valid are {valid}"
    return f"unknown {what} {value!r}{hint}"


def known_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted path of a section, groups included."""
    for name, field in section.model_fields.items():
        yield prefix + name
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from known_paths(annotation, f"{prefix}{name}.")


def unknown_path_problem(section: type[BaseModel], path: str) -> str | None:
    """A sentence that names the nearest valid path, or None where the path exists."""
    valid = list(known_paths(section))
    return None if path in valid else unknown_name("key", path, valid)
