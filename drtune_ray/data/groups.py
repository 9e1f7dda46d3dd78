"""Assign whole groups of images to splits: stratified by quota, in the order of the content hash.

A group's images and their exact copies in other groups stay together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

Quotas = Mapping[int, Mapping[str, int]]  # images of each label for each split


@dataclass
class Unit:
    """Images that stay together.

    Attributes:
        contents: Hashes of their content.
        labels: Number of different images of each label.
    """

    contents: set[str] = field(default_factory=set)
    labels: Counter[int] = field(default_factory=Counter)


def units_of(
    contents: Sequence[str], labels: Sequence[int], groups: Sequence[str | None]
) -> list[Unit]:
    """Return the units of images, given content, label and group of each, by their least hash."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.setdefault(name, name) != name:
            name = above[name]
        return name

    for content, group in zip(contents, groups, strict=True):
        if group is not None:
            above[top(f"content {content}")] = top(f"group {group}")
    units: dict[str, Unit] = defaultdict(Unit)
    for content, label in sorted(set(zip(contents, labels, strict=True))):
        unit = units[top(f"content {content}")]
        unit.contents.add(content)
        unit.labels[label] += 1
    return sorted(units.values(), key=lambda unit: min(unit.contents))


def fill_quotas(
    units: Iterable[Unit], quotas: Quotas, order: Sequence[str], assigned: dict[str, str]
) -> None:
    """Assign units that have no split yet; new images of an old unit follow its others.

    Args:
        units: All units, in order.
        quotas: Images of each label for each split.
        order: Splits in the order in which they are filled; the last takes what fits nowhere.
        assigned: Split by content, which is extended.
    """
    room = {label: dict(quota) for label, quota in quotas.items()}
    new: set[int] = set()
    units = list(units)
    for unit in units:
        if former := {assigned[c] for c in unit.contents if c in assigned}:
            _take(room, unit, _put(unit, min(former, key=order.index), assigned))
    for unit in units:
        if unit.contents.isdisjoint(assigned):
            split = next((s for s in order if _gain(room, unit, s) > 0), order[-1])
            new.add(id(unit))
            _take(room, unit, _put(unit, split, assigned))
    by_label: dict[int, list[Unit]] = defaultdict(list)
    for unit in units:
        for label in unit.labels:
            by_label[label].append(unit)
    for label in quotas:
        _fill_empty_splits(by_label[label], new, order, assigned)


def _gain(room: dict[int, dict[str, int]], unit: Unit, split: str) -> int:
    """Return how many images of a unit fill the quotas of a split, less those that exceed them."""
    rooms = {label: max(room[label][split], 0) for label in unit.labels}
    return sum(2 * min(number, rooms[at]) - number for at, number in unit.labels.items())


def _take(room: dict[int, dict[str, int]], unit: Unit, split: str) -> None:
    for label, number in unit.labels.items():
        room[label][split] -= number


def _put(unit: Unit, split: str, assigned: dict[str, str]) -> str:
    for content in unit.contents:
        assigned.setdefault(content, split)
    return split


def _fill_empty_splits(
    units: Sequence[Unit],
    new: Set[int],
    order: Sequence[str],
    assigned: dict[str, str],
) -> None:
    """Move the smallest new unit of a label to each split that has none, where others remain.

    Args:
        units: Units of the label.
        new: Ids of the units that had no split before.
        order: All splits.
        assigned: Split by content, which is changed.
    """
    for split in order:
        there = Counter(assigned[min(unit.contents)] for unit in units)
        if there[split]:
            continue
        movable = [
            unit for unit in units if id(unit) in new and there[assigned[min(unit.contents)]] > 1
        ]
        if movable:
            smallest = min(movable, key=lambda unit: (len(unit.contents), min(unit.contents)))
            for content in smallest.contents:
                assigned[content] = split


def parted(
    groups: Iterable[str | None], contents: Iterable[str], assigned: Mapping[str, str]
) -> Iterator[tuple[str, set[str]]]:
    """Yield the groups whose images are in several splits, with these splits."""
    splits: dict[str, set[str]] = defaultdict(set)
    for group, content in zip(groups, contents, strict=True):
        if group is not None:
            splits[group].add(assigned[content])
    return ((group, found) for group, found in splits.items() if len(found) > 1)
