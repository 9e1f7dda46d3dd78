"""Problems of a search space, each with its rule, its place and a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from drtune_ray.errors import ConfigError
from drtune_ray.values import LinedDict, LinedList


@dataclass(frozen=True)
class Place:
    """The place of a declaration.

    Attributes:
        source: Path of the file; empty if the space does not come from a file.
        line: Line of the file, from 1; without a file the rank of the declaration.
    """

    source: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.source else "search space"


@dataclass(frozen=True)
class Problem:
    """A broken rule.

    Attributes:
        rule: Name of the rule; tests/space/bad_spaces has a file of this name.
        place: Place of the declaration that breaks it.
        sentence: What is wrong, the values and the fix.
    """

    rule: str
    place: Place
    sentence: str

    def __str__(self) -> str:
        return f"{self.place}: {self.sentence}"


def place_below(container: Any, key: Any, otherwise: Place) -> Place:
    """Return the place of a key of a mapping, or of an item of a list, in its file."""
    if isinstance(container, LinedDict) and key in container.lines:
        return Place(container.source, container.lines[key])
    if isinstance(container, LinedList) and key < len(container.lines):
        return Place(container.source, container.lines[key])
    return otherwise


def refuse(problems: Iterable[Problem]) -> None:
    """Raise an error that names every problem, in the order of the file.

    Raises:
        ConfigError: If there is any problem.
    """
    ordered = sorted(problems, key=lambda problem: problem.place.line)
    if ordered:
        raise ConfigError(dict.fromkeys(map(str, ordered)))
