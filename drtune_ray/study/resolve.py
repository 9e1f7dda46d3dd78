"""The full configuration from a file, flags, assignments and defaults.

Precedence: ``--set`` > flags > file > what the study began with > defaults that fit the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drtune_ray.config.demo_weights import DEMO_BACKBONE
from drtune_ray.config.section import validated
from drtune_ray.config.sources import (
    data_source,
    mapping_of,
    merged_study,
    name_of,
    read_settings,
    trial_values,
)
from drtune_ray.config.study import STUDY, TRAINING, ResourcesConfig, StudyConfig, study_name
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.kinds.recognize import find_images
from drtune_ray.data.splits import num_train_at_least
from drtune_ray.errors import DrtuneError
from drtune_ray.folders import source_location
from drtune_ray.storage.record import recorded_config
from drtune_ray.study.machine import Machine, fitting_defaults, this_machine, without_gpus
from drtune_ray.values import deep_merge, flattened, full_path, nested, parse_assignments

SPACE = "space"
# Settings whose default is chosen once, when a study begins: a guess on another machine, or with
# other images in the folder, would make another study of it.
CHOSEN_ONCE_OF_TRIAL = (
    "backbone.name",
    "backbone.weights",
    "data.image_size",
    "training.epochs",
    "training.batch_size",
)
CHOSEN_ONCE = ("trials", SPACE, *(f"trial.{path}" for path in CHOSEN_ONCE_OF_TRIAL))


@dataclass(frozen=True)
class Place:
    """Location of the record of a study or training.

    Attributes:
        storage: Folder of all studies and trainings.
        name: Its name. Default: `training_name`.
        artifacts: URI of the files that outlive the driver's disk.
    """

    storage: str
    name: str | None = None
    artifacts: str | None = None


def study_request(
    study_file: Path | None,
    assignments: Iterable[str],
    flags: Mapping[str, Any],
    *,
    needs_images: bool = True,
) -> tuple[StudyConfig, list[str]]:
    """Return a study's configuration, and sentences about the chosen defaults.

    Args:
        study_file: YAML of a `StudyConfig`, or a study's record; None if there are only flags.
        assignments: Strings ``path=value``, with paths of the trial or of the study.
        flags: Flags of the command line; see `merged_study`.
        needs_images: Whether a folder of images that is missing is refused at once.

    Raises:
        ConfigError: Naming every problem.
    """
    asked = merged_study(study_file, assignments, flags)
    recorded = _recorded(_place_of(asked), STUDY, CHOSEN_ONCE, asked)

    def resolved(machine: Machine, num_train: int | None) -> tuple[StudyConfig, dict[str, Any]]:
        defaults = _fitted(fitting_defaults(machine), asked["trial"], num_train, "trial.")
        defaults["resources"] = _fitting_resources(defaults, mapping_of(asked, "resources"))
        settings = deep_merge(deep_merge(defaults, nested(recorded)), asked)
        return StudyConfig.from_mapping(settings), defaults

    # Refuses at once what is wrong: counting GPUs needs torch.
    config, _ = resolved(without_gpus(), None)
    data = config.trial.data
    num_train = num_train_at_least(find_images(data), data) if needs_images else None
    config, defaults = resolved(this_machine(), num_train)
    return config, _say(defaults, recorded, asked)


def trial_request(
    trial_file: Path | None,
    assignments: Iterable[str],
    flags: Mapping[str, Any],
    place: Place | None = None,
) -> tuple[TrialConfig, ResourcesConfig, list[str]]:
    """Return the configuration of a single training, and the resources of its workers.

    The file may hold ``resources`` beside the settings of the trial, as a study's does.

    Args:
        trial_file: YAML of a `TrialConfig`, or a training's record; None if there are only flags.
        assignments: Strings ``path=value``.
        flags: Flags of the command line; see `TRIAL_FLAGS`.
        place: Where the training is recorded, if it may have begun already.

    Raises:
        ConfigError: Naming every problem.
    """
    trial = read_settings(trial_file, TRAINING) if trial_file else {}
    trial = deep_merge(trial, nested(trial_values(flags)))
    trial = deep_merge(trial, nested(parse_assignments(assignments)))
    asked = mapping_of(trial, "resources")
    trial.pop("resources", None)
    source = data_source(trial)
    preset = trial.pop("preset", None)
    recorded: dict[str, Any] = {}
    if place is not None:
        name = place.name or training_name(source)
        place = Place(place.storage, name, place.artifacts)
        recorded = _recorded(place, TRAINING, CHOSEN_ONCE_OF_TRIAL, trial)

    def resolved(
        machine: Machine, num_train: int | None
    ) -> tuple[TrialConfig, ResourcesConfig, dict[str, Any]]:
        defaults = _fitted(fitting_defaults(machine), trial, num_train)
        chosen = deep_merge(defaults["trial"], nested(recorded))
        config = TrialConfig.from_mapping(deep_merge(chosen, trial), preset=preset)
        fitting = _fitting_resources(defaults, asked)
        resources = validated(ResourcesConfig, fitting | dict(asked), "resources.")
        return config, resources, defaults["trial"]

    # Refuses at once what is wrong: counting GPUs needs torch.
    data = resolved(without_gpus(), None)[0].data
    num_train = num_train_at_least(find_images(data), data)
    config, resources, defaults = resolved(this_machine(), num_train)
    return config, resources, _say(defaults, recorded, trial)


def training_name(images: str | Path) -> str:
    """Return the default name of a training, made from its source of images."""
    return f"{name_of(source_location(str(images)))}-train"


def _place_of(asked: Mapping[str, Any]) -> Place:
    """Return the place that settings give, which nothing has validated yet."""
    default = StudyConfig.model_fields["storage"].default
    storage, name, uri = asked.get("storage", default), asked["name"], asked.get("artifacts")
    return Place(str(storage), str(name), uri if isinstance(uri, str) else None)


def _recorded(
    place: Place, kind: str, paths: Iterable[str], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings among some paths that a study began with and nobody gives now."""
    config: Mapping[str, Any] = {}
    # What is wrong with the place or its record is reported when it is checked or opened.
    with suppress(DrtuneError, ValueError, OSError):
        folder = full_path(place.storage) / study_name(place.name or "")
        config = recorded_config(folder, kind, place.artifacts)
    given = _given(asked)
    there = flattened({key: value for key, value in config.items() if key != SPACE})
    there |= {key: value for key, value in config.items() if key == SPACE}
    return {path: there[path] for path in paths if path in there and path not in given}


def _fitted(
    defaults: dict[str, Any], trial: Mapping[str, Any], num_train: int | None, prefix: str = ""
) -> dict[str, Any]:
    """Return the defaults, adjusted to the given settings and the number of training images."""
    backbone = mapping_of(trial, "backbone", prefix)
    name, weights = backbone.get("name"), backbone.get("weights")
    chosen: dict[str, Any] = {}
    if name and name != defaults["trial"]["backbone"]["name"]:
        chosen["trial.backbone.weights"] = "timm"
    if weights == "demo" and not name:
        chosen["trial.backbone.name"] = DEMO_BACKBONE
    size = defaults["trial"]["training"]["batch_size"]
    while num_train is not None and size > max(num_train, 2):
        size //= 2
    chosen["trial.training.batch_size"] = size
    return deep_merge(defaults, nested(chosen))


def _fitting_resources(defaults: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default resources without those that the given settings replace."""
    replaced = "gpus_per_worker" if "gpus_per_trial" in asked else None
    return {key: value for key, value in defaults["resources"].items() if key != replaced}


def _given(asked: Mapping[str, Any]) -> set[str]:
    """Return the paths that settings give; a space that is written out is one of them."""
    paths = flattened(asked).keys()
    return {*paths, *(path.partition(".")[0] for path in paths)}


def _say(
    defaults: Mapping[str, Any], recorded: Mapping[str, Any], asked: Mapping[str, Any]
) -> list[str]:
    """Return a sentence about the defaults of the record, and one about those of the machine."""
    known = _given(asked) | recorded.keys()
    fitted = [f"{key}={value}" for key, value in flattened(defaults).items() if key not in known]
    found = [f"{k}={v}" if k != SPACE else k for k, v in recorded.items()]
    machine = f"Defaults for this machine ({this_machine().describe()})"
    kinds = {"Recorded when it began": found, machine: fitted}
    return [f"{what}: {', '.join(texts)}" for what, texts in kinds.items() if texts]
