"""Base of all groups of settings: rejects what it does not know, in sentences with the fix."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from drtune_ray.errors import ConfigError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
A_MAPPING = "it must be a mapping of settings"
UNKNOWN = "extra_forbidden"
SLIP = 0.8  # similarity of a word and the same word with a letter wrong, missing or too many
# What pydantic says in the words of Python.
PLAIN_WORDS = {
    "model_type": A_MAPPING,
    "dict_type": A_MAPPING,
    "tuple_type": "it must be a list",
    "too_long": "it has too many items",
}


def _workers(value: Any) -> int | tuple[int, int]:
    """Return a number of workers, or the smallest and the largest number."""
    bounds = list(value) if isinstance(value, list | tuple) else [value]
    are_counts = all(type(bound) is int and bound >= 1 for bound in bounds)
    if not are_counts or len(bounds) > 2 or bounds != sorted(bounds) or not bounds:
        raise ValueError(
            f"workers must be a number from 1, or [min, max] of them, but got {value!r}"
        )
    return bounds[0] if bounds[0] == bounds[-1] else (bounds[0], bounds[1])


Workers = Annotated[int | tuple[int, int], BeforeValidator(_workers)]


class Section(BaseModel):
    """Frozen group of settings that rejects unknown keys and documents each of its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


S = TypeVar("S", bound=Section)


def validated(
    section: type[S], values: Mapping[str, Any], prefix: str = "", what: str = "key"
) -> S:
    """Build a section, turning pydantic's errors into one `ConfigError`.

    Args:
        section: Class of the section.
        values: Nested plain values.
        prefix: Text before each path in the messages.
        what: Name of a key in the messages.
    """
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_sentences(section, error.errors(), prefix, what)) from None


def _sentences(
    section: type[Section], problems: Iterable[Any], prefix: str, what: str
) -> Iterator[str]:
    known = set(known_paths(section))

    def place(problem: Any) -> tuple[str, str, str]:
        kind = {"invalid_key": UNKNOWN}.get(problem["type"], problem["type"])  # a number, say
        path = (prefix + _path(problem["loc"], known, is_unknown=kind == UNKNOWN)).rstrip(".")
        return path, kind if kind in (UNKNOWN, "missing") else "", repr(problem["input"])

    # Each member of a union has something to say of a value: that is one sentence.
    for (path, kind, value), of_value in itertools.groupby(problems, place):
        reasons = list(of_value)
        if kind == UNKNOWN:
            yield unknown_name(what, path, [prefix + name for name in sorted(known)])
        elif kind == "missing":
            yield f"{path} is missing: give it a value"
        elif reasons[0]["type"] == "value_error":
            yield (f"{path}: " if path else "") + reason(reasons[0])
        else:
            yield refusal(path, value, map(reason, reasons))


def _path(location: Iterable[Any], known: set[str], *, is_unknown: bool) -> str:
    """Return the dotted path: a location holds union members and validators beside the keys."""
    keys: list[str] = []
    item = ""
    for part in location:
        if is_unknown or ".".join([*keys, str(part)]) in known:
            keys.append(str(part))
        elif isinstance(part, int):
            item = f"[{part}]"
    return ".".join(keys) + item


def refusal(path: str, value: str, reasons: Iterable[str]) -> str:
    """Return a sentence about a value, given as text, that a setting does not accept."""
    return f"{path}={value} is not valid: {' or '.join(dict.fromkeys(reasons))}"


def not_a_mapping(path: str, value: Any) -> str:
    """Return a sentence about a value in place of a group of settings."""
    return refusal(path, repr(value), [A_MAPPING])


def reason(problem: Any) -> str:
    """Return what is wrong with a value, from one of pydantic's errors."""
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    message = str(PLAIN_WORDS.get(problem["type"], problem["msg"]))
    return message[:1].lower() + message[1:]


def unknown_name(what: str, value: str, valid: Iterable[str]) -> str:
    """Return a sentence about a name that is not among the valid ones, with the nearest one."""
    valid = list(valid)
    group, _, word = value.rpartition(".")
    beside = [name.rpartition(".")[2] for name in valid if name.rpartition(".")[0] == group]
    slips = difflib.get_close_matches(word, beside, n=1, cutoff=SLIP)
    nearest = [f"{group}.{name}".removeprefix(".") for name in slips]
    longer = [name for name in valid if name.startswith(group) and name.endswith(f"_{word}")]
    others = [name for name in valid if not value.startswith(f"{name}.")]  # not its own group
    nearest = nearest or longer[:1] or difflib.get_close_matches(value, others, n=1, cutoff=0.5)
    if not nearest:
        leaf = value.rsplit(".", 1)[-1]
        nearest = [path for path in valid if path.rsplit(".", 1)[-1] == leaf][:1]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; valid are {_beside(value, valid)}"
    return f"unknown {what} {value!r}{hint}"


def _beside(value: str, valid: list[str]) -> list[str]:
    """Return the valid names of a name's own group, or of the nearest group around it."""
    group = value
    while group:
        group = group.rpartition(".")[0]
        prefix = f"{group}." if group else ""
        if found := [n for n in valid if n.startswith(prefix) and "." not in n[len(prefix) :]]:
            return found
    return valid


def known_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted path of a section, groups included."""
    for name, field in section.model_fields.items():
        yield prefix + name
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from known_paths(annotation, f"{prefix}{name}.")
