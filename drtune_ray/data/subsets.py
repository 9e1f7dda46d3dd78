"""Parts of the images: a fold of a cross-validation, and a share of the training images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.groups import fill_quotas, units_of
from drtune_ray.data.sources import GROUP, ScannedImages
from drtune_ray.errors import ConfigError
from drtune_ray.values import digest


def fold_contents(images: ScannedImages, config: DataConfig) -> set[str]:
    """Return the contents of the images in the part `fold` of `folds`.

    The parts have the same share of each class but for rounding. Copies and groups stay together,
    and the order in which the parts are filled follows from `fold_seed` and the contents.

    Raises:
        ConfigError: If a class has too few different images; every such class is named.
    """
    names = ("content_hash", "label", GROUP)
    contents, labels, groups = (images.files[name].to_pylist() for name in names)
    folds = config.folds or 1
    totals = Counter(label for _, label in set(zip(contents, labels, strict=True)))
    least = max(folds, 4 if folds == 2 else 3)  # 1 to train and 1 to validate beside the fold
    problems = [
        f"data.folds={folds} needs {least} different images of each class, but class {name!r} has "
        f"{totals[label]}: add images or lower data.folds"
        for label, name in enumerate(images.classes)
        if totals[label] < least
    ]
    if problems:
        raise ConfigError(problems)
    units = units_of(contents, labels, groups)
    units.sort(key=lambda unit: digest("fold", config.fold_seed, min(unit.contents)))
    parts = [str(number) for number in range(folds)]
    quotas = {
        label: {
            part: total // folds + ((number + label) % folds < total % folds)
            for number, part in enumerate(parts)
        }
        for label, total in totals.items()
    }
    assigned: dict[str, str] = {}
    fill_quotas(units, quotas, parts, assigned)
    return {content for content, part in assigned.items() if part == parts[config.fold]}


def share_mask(
    contents: Sequence[str], labels: Sequence[int], is_train: Sequence[bool], share: float
) -> list[bool]:
    """Return which images stay when a share of each class's training images is used.

    The images are taken in the order of the content hash, so that a smaller share is part of a
    larger one. An image counts once however many copies it has; a class keeps at least one.
    """
    rows = list(zip(contents, labels, is_train, strict=True))
    of_class: dict[int, set[str]] = defaultdict(set)
    for content, label, trains in rows:
        if trains:
            of_class[label].add(content)
    kept = {
        (content, label)
        for label, found in of_class.items()
        for content in sorted(found)[: max(1, round(share * len(found)))]
    }
    return [not trains or (content, label) in kept for content, label, trains in rows]
