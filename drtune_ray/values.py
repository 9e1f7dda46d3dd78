"""Plain values of configurations: YAML, dotted paths, hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from drtune_ray.errors import ConfigError

# Errors of PyYAML: syntax; binary content or an impossible date; !!timestamp on another value.
NOT_YAML = (yaml.YAMLError, ValueError, AttributeError)
MAX_DEPTH, MAX_VALUES = 50, 100_000
# Python takes long for numbers of 100,000 digits, and cannot print those of more than 4,300.
MAX_NUMBER_LENGTH = 100
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def full_path(path: str | Path) -> Path:
    """Return the absolute path of a user's path, which may begin with ``~``.

    Raises:
        ConfigError: If it is not a valid path.
    """
    there = at_home(path)
    try:
        return there.resolve()
    except (ValueError, RuntimeError) as error:  # a null byte; links in a circle
        raise ConfigError(f"{str(path)!r} is not a valid path ({error}): correct it") from None


def at_home(path: str | Path) -> Path:
    """Expand ``~`` in a user's path without following links.

    Raises:
        ConfigError: If the home directory is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{str(path)!r} begins with an unknown home directory: write the full path"
        ) from None


def printable(path: str | Path) -> str:
    r"""Return a path for messages: bytes that are no UTF-8, and control characters, as ``\xe9``."""
    text = str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse ``path=value`` strings to {path: value}; values are YAML.

    Raises:
        ConfigError: If a string has no ``=`` or a value is not YAML.
    """
    values, problems = {}, []
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path.strip():
            problems.append(f"--set {assignment!r} must be path=value, like training.epochs=20")
            continue
        try:
            source = f"--set {path.strip()}"
            value = _loaded(text, source, yaml.SafeLoader) if text.strip() else text
            values[path.strip()] = value
        except ConfigError as error:
            problems += error.problems
        except NOT_YAML:
            problems.append(f"--set {assignment!r} has a value that is not YAML: quote it")
    if problems:
        raise ConfigError(problems)
    return values


class LinedDict(dict[str, Any]):
    """A mapping from a YAML file, with the line of each key.

    Attributes:
        source: Path of the file as the user gave it.
        lines: Line number of each key, from 1.
    """

    source = ""
    lines: Mapping[str, int] = {}


class LinedList(list[Any]):
    """A list from a YAML file, with the line of each item.

    Attributes:
        source: Path of the file as the user gave it.
        lines: Line number of each item, from 1.
    """

    source = ""
    lines: Sequence[int] = ()


class _LinedLoader(yaml.SafeLoader):
    """Loads mappings as `LinedDict` and lists as `LinedList`."""


def _lined_dict(loader: _LinedLoader, node: yaml.MappingNode) -> LinedDict:
    content = LinedDict(cast(dict[str, Any], loader.construct_mapping(node, deep=True)))
    content.source = str(loader.name)
    content.lines = {loader.construct_object(key): key.start_mark.line + 1 for key, _ in node.value}
    return content


def _lined_list(loader: _LinedLoader, node: yaml.SequenceNode) -> LinedList:
    content = LinedList(loader.construct_sequence(node, deep=True))
    content.source = str(loader.name)
    content.lines = [item.start_mark.line + 1 for item in node.value]
    return content


_LinedLoader.add_constructor("tag:yaml.org,2002:map", _lined_dict)
_LinedLoader.add_constructor("tag:yaml.org,2002:seq", _lined_list)


def read_yaml(path: Path, *, with_lines: bool = False) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.
        with_lines: Return `LinedDict` and `LinedList`, for messages that name a line.

    Raises:
        ConfigError: If the file is missing, not YAML, not a mapping, repeats a key, refers to
            itself or is nested too deep.
    """
    try:
        kind = _LinedLoader if with_lines else yaml.SafeLoader
        content = _loaded(path.read_text(), str(path), kind)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a YAML file") from None
    except ConfigError:
        raise
    except NOT_YAML as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return content


def _loaded(text: str, source: str, kind: type[yaml.SafeLoader]) -> Any:
    loader = kind(text)
    loader.name = source
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, source, {}) > MAX_VALUES:
            raise ConfigError(
                f"{source} has more than {MAX_VALUES} values once its aliases are written out: "
                "write it without them"
            )
        if problems := list(_repeated_keys(node, source, set())):
            raise ConfigError(problems)
        return loader.construct_document(node)
    except RecursionError:
        raise ConfigError(_too_deep(source)) from None
    finally:
        loader.dispose()


def _num_values(node: yaml.Node, source: str, known: dict[int, int | None], depth: int = 0) -> int:
    """Return the number of values below a node with aliases written out.

    Raises:
        ConfigError: If the node contains itself, is nested too deep, or is too long a number.
    """
    line = node.start_mark.line + 1
    if node.tag in NUMBERS and len(node.value) > MAX_NUMBER_LENGTH:
        raise ConfigError(
            f"{source}:{line}: a number of {len(node.value)} characters: write it with at most "
            f"{MAX_NUMBER_LENGTH}"
        )
    if depth > MAX_DEPTH:
        raise ConfigError(_too_deep(f"{source}:{line}"))
    if id(node) not in known:
        known[id(node)] = None  # until its number is known
        below = [_num_values(n, source, known, depth + 1) for n in _below(node)]
        known[id(node)] = 1 + sum(below)
    if (number := known[id(node)]) is None:
        raise ConfigError(
            f"{source}:{line}: what begins here contains itself: remove the alias (*) in it"
        )
    return number


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _too_deep(place: str) -> str:
    return f"{place}: more than {MAX_DEPTH} levels below each other: write it flat"


def _repeated_keys(node: yaml.Node, source: str, seen: set[int]) -> Iterator[str]:
    """Yield a message for each duplicate key: YAML would silently drop the first."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item, source, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[Any, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.value in first:
            yield (
                f"{source}:{line}: {key.value} is also set on line {first[key.value]}: remove one "
                "of them"
            )
        elif isinstance(key, yaml.ScalarNode):
            first[key.value] = line
        yield from _repeated_keys(value, source, seen)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return a mapping as YAML, keeping its order."""
    return yaml.safe_dump(dict(values), sort_keys=False)


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the nested values of `over` replacing its own."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = deep_merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def flattened_without(values: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return :func:`flattened` values without those at or below the given paths."""
    groups = tuple(f"{path}." for path in paths)
    return {
        key: value for key, value in flattened(values).items() if not f"{key}.".startswith(groups)
    }


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nest dotted paths: {"a.b": 1} becomes {"a": {"b": 1}}."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        *groups, leaf = path.split(".")
        inner = result
        for key in groups:
            below = inner.get(key)
            # A copy: it may be a mapping that was given as a value.
            inner[key] = inner = dict(below) if isinstance(below, Mapping) else {}
        is_merged = isinstance(value, Mapping) and isinstance(inner.get(leaf), Mapping)
        inner[leaf] = deep_merge(inner[leaf], value) if is_merged else value
    return result


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten to dotted paths: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest(*parts: Any) -> str:
    """Return a short, stable hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
