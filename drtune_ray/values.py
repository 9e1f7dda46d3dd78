"""Plain values of configurations: YAML, dotted paths, hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from drtune_ray.errors import ConfigError

# Of PyYAML on a file. The second: no text, a date that does not exist; the third: !!timestamp of
# something else.
NOT_YAML = (yaml.YAMLError, ValueError, AttributeError)


def full_path(path: str | Path) -> Path:
    """An absolute path from one that a user gave, which may begin with ``~``.

    Raises:
        ConfigError: If it cannot be a path here.
    """
    there = at_home(path)
    try:
        return there.resolve()
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} cannot be a path ({error}): correct it") from None


def at_home(path: str | Path) -> Path:
    """A path that a user gave, which may begin with ``~``; links are not followed.

    Raises:
        ConfigError: If it begins with a home that is not known here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{str(path)!r} begins with a home that is not known here: write the whole path"
        ) from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``path=value`` strings to {path: value}; values are read as YAML.

    Raises:
        ConfigError: For a string without ``=``.
    """
    values, problems = {}, []
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path.strip():
            problems.append(f"--set {assignment!r} must be path=value, like training.epochs=20")
            continue
        try:
            values[path.strip()] = yaml.safe_load(text) if text.strip() else text
        except NOT_YAML:
            problems.append(f"--set {assignment!r} has a value that is not YAML: quote it")
    if problems:
        raise ConfigError(problems)
    return values


class LinedDict(dict[str, Any]):
    """A mapping of a YAML file that knows where its keys stand.

    Attributes:
        source: The file, as it was given.
        lines: Line of each key, from 1.
    """

    source = ""
    lines: Mapping[str, int] = {}


class LinedList(list[Any]):
    """A list of a YAML file that knows where its items stand.

    Attributes:
        source: The file, as it was given.
        lines: Line of each item, from 1.
    """

    source = ""
    lines: Sequence[int] = ()


class _LinedLoader(yaml.SafeLoader):
    """Gives `LinedDict` and `LinedList` for mappings and lists."""


def _lined_dict(loader: _LinedLoader, node: yaml.MappingNode) -> Iterator[LinedDict]:
    content = LinedDict()
    yield content  # filled afterwards, so that an alias to it may stand below it
    content.update(cast(dict[str, Any], loader.construct_mapping(node)))
    content.source = str(loader.name)
    content.lines = {loader.construct_object(key): key.start_mark.line + 1 for key, _ in node.value}


def _lined_list(loader: _LinedLoader, node: yaml.SequenceNode) -> Iterator[LinedList]:
    content = LinedList()
    yield content
    content.extend(loader.construct_sequence(node))
    content.source = str(loader.name)
    content.lines = [item.start_mark.line + 1 for item in node.value]


_LinedLoader.add_constructor("tag:yaml.org,2002:map", _lined_dict)
_LinedLoader.add_constructor("tag:yaml.org,2002:seq", _lined_list)


def read_yaml(path: Path, *, with_lines: bool = False) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Args:
        path: The file.
        with_lines: Give `LinedDict` and `LinedList`, for messages that name a line.

    Raises:
        ConfigError: If it is missing, not YAML, not a mapping, or repeats a key.
    """
    try:
        content = _loaded(path, _LinedLoader if with_lines else yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a YAML file") from None
    except ConfigError:
        raise
    except NOT_YAML as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return content


def _loaded(path: Path, kind: type[yaml.SafeLoader]) -> Any:
    loader = kind(path.read_text())
    loader.name = str(path)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if problems := list(_repeated_keys(node, path, set())):
            raise ConfigError(problems)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _repeated_keys(node: yaml.Node, path: Path, seen: set[int]) -> Iterator[str]:
    """A sentence for each key that a mapping has twice: YAML would drop the first silently."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item, path, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[Any, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.value in first:
            yield (
                f"{path}:{line}: {key.value} stands here and on line {first[key.value]}: remove "
                "one of them"
            )
        elif isinstance(key, yaml.ScalarNode):
            first[key.value] = line
        yield from _repeated_keys(value, path, seen)


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML in the order of the mapping."""
    return yaml.safe_dump(dict(values), sort_keys=False)


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the nested values of `over` on top."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = deep_merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def flattened_without(values: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """As :func:`flattened`, without the values at and below some paths."""
    groups = tuple(f"{path}." for path in paths)
    return {
        key: value for key, value in flattened(values).items() if not f"{key}.".startswith(groups)
    }


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} to {"a": {"b": 1}}."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        *groups, leaf = path.split(".")
        inner = value
        for key in reversed([*groups, leaf]):
            inner = {key: inner}
        result = deep_merge(result, inner)
    return result


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def digest(*parts: Any) -> str:
    """A short stable hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
