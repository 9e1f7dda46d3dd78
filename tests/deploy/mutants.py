"""Every leaf of a manifest dropped, renamed and given another type, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.deploy.manifests import Object

Path = tuple[str | int, ...]
CHANGES = ("drop", "rename", "retype")


@dataclass(frozen=True)
class Mutant:
    """A change of one leaf.

    Attributes:
        kind: Of the object.
        path: Where the leaf is.
        change: One of `CHANGES`.
    """

    kind: str
    path: Path
    change: str

    def __str__(self) -> str:
        return f"{self.change} {self.kind} {'/'.join(map(str, self.path))}"


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Paths and values of what holds nothing further."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def mutants_of(one: Object) -> Iterator[Mutant]:
    for path, _ in leaves(one):
        for change in CHANGES:
            yield Mutant(one["kind"], path, change)


def mutated(one: Object, mutant: Mutant) -> Object:
    """The object with one leaf changed."""
    changed = copy.deepcopy(one)
    *above, last = mutant.path
    place: Any = changed
    for step in above:
        place = place[step]
    if mutant.change == "drop":
        del place[last]
    elif mutant.change == "retype":
        place[last] = _of_another_type(place[last])
    elif isinstance(last, int):  # an item of a list has no name: its text is misspelt
        place[last] = f"{place[last]}x"
    else:
        place[f"{last}x"] = place.pop(last)
    return changed


def _of_another_type(value: Any) -> Any:
    """Numbers and booleans become texts, which is the usual mistake; all else a mapping."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return [value] if isinstance(value, dict) else {"value": value}
