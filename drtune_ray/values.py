"""Plain values of configurations: YAML, dotted paths, hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from drtune_ray.errors import ConfigError


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
        except yaml.YAMLError:
            problems.append(f"--set {assignment!r} has a value that is not YAML: quote it")
    if problems:
        raise ConfigError(problems)
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: If it is missing, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return content


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
