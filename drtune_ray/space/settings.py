"""The settings and facts that a search space may name, and the values that a setting accepts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from drtune_ray.config.section import known_paths, reason, refusal
from drtune_ray.config.trial import TrialConfig

NUM_TRAIN, NUM_CLASSES = "data.num_train", "data.num_classes"
# Known once the images have been read; expressions may use them.
FACTS = {NUM_TRAIN: "number of training images", NUM_CLASSES: "number of classes"}
BY_CATEGORY = ("choice", "ordered", "constant")


@dataclass(frozen=True)
class Restriction:
    """The kinds of parameter that a setting may be.

    Attributes:
        kinds: Allowed kinds; empty if the setting cannot be searched.
        reason: Rest of the message for any other kind, after the path.
    """

    kinds: tuple[str, ...]
    reason: str


PREPARED_ONCE = Restriction(
    (),
    "is shared by all trials of a study, which prepares it once: set it in the trial and run one "
    "study for each value",
)
OF_STUDY = Restriction(
    (),
    "chooses among all trials of a study: set it as the first of the study's objectives",
)
# Each value needs prepared tables of its own, so there must be few.
IN_TABLES = Restriction(
    BY_CATEGORY,
    "changes the prepared images and features, of which each value needs its own: search it as "
    "choice, ordered or constant",
)
# A file for each backbone may follow from its name.
WEIGHTS = Restriction((*BY_CATEGORY, "expression"), IN_TABLES.reason)
# As settings that are not listed.
FREE = Restriction(("float", "int", *BY_CATEGORY, "expression"), "")
A_LIST = Restriction(
    (),
    "is a list, which a search space cannot hold: set it in the trial, or search "
    "backbone.frozen_layers",
)
# Settings that are not listed here, alone or by their group, may be of every kind.
RESTRICTIONS = {
    "data": PREPARED_ONCE,
    "data.crop_scale_min": IN_TABLES,
    "data.horizontal_flip": IN_TABLES,
    "data.augmentation": IN_TABLES,
    "data.augmentation_magnitude": IN_TABLES,
    "data.random_erasing": IN_TABLES,
    "data.sampling": FREE,
    "data.views": IN_TABLES,
    "data.image_size": IN_TABLES,
    "backbone": PREPARED_ONCE,
    "backbone.name": IN_TABLES,
    "backbone.weights": WEIGHTS,
    "backbone.frozen_layers": FREE,
    "backbone.frozen_patterns": A_LIST,
    "backbone.drop_path": FREE,
    "backbone.dropout": FREE,
    "seed": PREPARED_ONCE,
    "training.epochs": PREPARED_ONCE,
    "training.stop_epoch": PREPARED_ONCE,
    "training.workers": PREPARED_ONCE,
    "training.metric": OF_STUDY,
}


def restriction_of(path: str) -> Restriction | None:
    """Return the restriction of a setting: its own, or that of its group."""
    return RESTRICTIONS.get(path) or RESTRICTIONS.get(path.split(".")[0])


@functools.cache
def setting_paths() -> tuple[str, ...]:
    """Return every dotted path of `TrialConfig` that holds a value."""
    paths = tuple(known_paths(TrialConfig))
    return tuple(p for p in paths if not any(other.startswith(f"{p}.") for other in paths))


def normal_value(path: str, value: Any) -> tuple[Any, str | None]:
    """Return a value as the configuration holds it, and a sentence if the setting refuses it.

    Other settings do not matter: ``optim.nesterov`` accepts true at any momentum.
    """
    adapter = _adapter(path)
    try:
        return adapter.dump_python(adapter.validate_python(value), mode="json"), None
    except ValidationError as error:
        return value, refusal(path, repr(value), map(reason, error.errors()))


@functools.cache
def sections_with_rules() -> tuple[tuple[type[BaseModel], Mapping[str, str]], ...]:
    """Return the sections with rules between settings, each with its settings' paths by name."""
    groups = ("", *(path for path in known_paths(TrialConfig) if path not in setting_paths()))
    found = []
    for group in groups:
        section = _section(group)
        rules = section.__pydantic_decorators__
        prefix = f"{group}." if group else ""
        if rules.model_validators or rules.field_validators:
            below = (path for path in setting_paths() if path.startswith(prefix))
            found.append((section, {path.removeprefix(prefix): path for path in below}))
    return tuple(found)


@functools.cache
def _adapter(path: str) -> TypeAdapter[Any]:
    group, _, leaf = path.rpartition(".")
    annotation = _section(group).model_fields[leaf].rebuild_annotation()
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def _section(group: str) -> type[BaseModel]:
    """Return the class of a group of settings; of the whole trial for an empty path."""
    section: type[BaseModel] = TrialConfig
    for name in filter(None, group.split(".")):
        annotation = section.model_fields[name].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return section
