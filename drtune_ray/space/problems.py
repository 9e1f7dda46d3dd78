"""What is wrong with a search space: each problem with the rule that it breaks and its place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from drtune_ray.errors import ConfigError
from drtune_ray.values import LinedDict, LinedList


@dataclass(frozen=True)
class Place:
    """Where something is declared.

    Attributes:
        source: The file; empty where the space did not come from one.
        line: Of the file, from 1; without a file the rank of the declaration.
    """

    source: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.source else "search space"


@dataclass(frozen=True)
class Problem:
    """A broken rule.

    Attributes:
        rule: Its name; a file of this name lies in tests/search/bad_spaces.
        place: Where.
        sentence: The condition, the values and the fix.
    """

    rule: str
    place: Place
    sentence: str

    def __str__(self) -> str:
        return f"{self.place}: {self.sentence}"


def place_below(container: Any, key: Any, otherwise: Place) -> Place:
    """Where a key of a mapping, or an item of a list, stands in its file."""
    if isinstance(container, LinedDict) and key in container.lines:
        return Place(container.source, container.lines[key])
    if isinstance(container, LinedList) and key < len(container.lines):
        return Place(container.source, container.lines[key])
    return otherwise


def refuse(problems: Iterable[Problem]) -> None:
    """Raise what was found, in the order of the file.

    Raises:
        ConfigError: If there is any problem.
    """
    ordered = sorted(problems, key=lambda problem: problem.place.line)
    if ordered:
        raise ConfigError(dict.fromkeys(map(str, ordered)))
