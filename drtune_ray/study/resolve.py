"""The full configuration from a file, flags, assignments and defaults.

Precedence: ``--set`` > flags > file > defaults that fit the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from drtune_ray.config.section import validated
from drtune_ray.config.sources import (
    data_folder,
    mapping_of,
    merged_study,
    name_of,
    read_settings,
    trial_values,
)
from drtune_ray.config.study import TRAINING, ResourcesConfig, StudyConfig
from drtune_ray.config.trial import DataConfig, TrialConfig
from drtune_ray.data.sources import IMAGE_SUFFIXES
from drtune_ray.study.machine import fitting_defaults, this_machine
from drtune_ray.training.backbones import DEMO_BACKBONE
from drtune_ray.values import deep_merge, flattened, full_path, nested, parse_assignments


def study_request(
    study_file: Path | None, assignments: Iterable[str], flags: Mapping[str, Any]
) -> tuple[StudyConfig, list[str]]:
    """Return a study's configuration, and sentences about the chosen defaults.

    Args:
        study_file: YAML of a `StudyConfig`, or a study's record; None if there are only flags.
        assignments: Strings ``path=value``, with paths of the trial or of the study.
        flags: Flags of the command line; see `merged_study`.

    Raises:
        ConfigError: Naming every problem.
    """
    asked = merged_study(study_file, assignments, flags)
    trial = asked["trial"]
    defaults = _fitted(
        fitting_defaults(this_machine()), trial, data_folder(trial, "trial."), "trial."
    )
    defaults["resources"] = _fitting_resources(defaults, mapping_of(asked, "resources"))
    config = StudyConfig.from_mapping(deep_merge(defaults, asked))
    return config, _say(defaults, asked)


def trial_request(
    trial_file: Path | None, assignments: Iterable[str], flags: Mapping[str, Any]
) -> tuple[TrialConfig, ResourcesConfig, list[str]]:
    """Return the configuration of a single training, and the resources of its workers.

    The file may hold ``resources`` beside the settings of the trial, as a study's does.
    """
    trial = read_settings(trial_file, TRAINING) if trial_file else {}
    trial = deep_merge(trial, nested(trial_values(flags)))
    trial = deep_merge(trial, nested(parse_assignments(assignments)))
    asked = mapping_of(trial, "resources")
    trial.pop("resources", None)
    folder = data_folder(trial)
    defaults = _fitted(fitting_defaults(this_machine()), trial, folder)
    preset = trial.pop("preset", None)
    config = TrialConfig.from_mapping(deep_merge(defaults["trial"], trial), preset=preset)
    fitting = _fitting_resources(defaults, asked)
    resources = validated(ResourcesConfig, fitting | dict(asked), "resources.")
    said = _say({"trial": defaults["trial"]}, {"trial": trial})
    return config, resources, said


def default_name(config: TrialConfig) -> str:
    """Return the default name, that of the folder of images."""
    return name_of(full_path(config.data.train))


def _fitted(
    defaults: dict[str, Any], trial: Mapping[str, Any], folder: Path, prefix: str = ""
) -> dict[str, Any]:
    """Return the defaults, adjusted to the given settings."""
    backbone = mapping_of(trial, "backbone", prefix)
    name, weights = backbone.get("name"), backbone.get("weights")
    chosen: dict[str, Any] = {}
    if name and name != defaults["trial"]["backbone"]["name"]:
        chosen["trial.backbone.weights"] = "timm"
    if weights == "demo" and not name:
        chosen["trial.backbone.name"] = DEMO_BACKBONE
    size = defaults["trial"]["training"]["batch_size"]
    num_train = _num_train_at_least(folder, mapping_of(trial, "data"))
    while size > max(num_train, 2):
        size //= 2
    chosen["trial.training.batch_size"] = size
    return deep_merge(defaults, nested(chosen))


def _fitting_resources(defaults: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default resources without those that the given settings replace."""
    replaced = "gpus_per_worker" if "gpus_per_trial" in asked else None
    return {key: value for key, value in defaults["resources"].items() if key != replaced}


def _num_train_at_least(folder: Path, data: Mapping[str, Any]) -> int:
    """Return a lower bound of the number of training images, before they are scanned."""
    if not folder.is_dir():
        return 0
    classes = [path for path in folder.iterdir() if path.is_dir()]
    images = sum(p.suffix.lower() in IMAGE_SUFFIXES for c in classes for p in c.rglob("*"))
    if isinstance(data.get("train_per_class"), int):
        return int(data["train_per_class"]) * len(classes)
    fields = DataConfig.model_fields
    shares = [
        data.get(key, fields[key].default) for key in ("validation_fraction", "test_fraction")
    ]
    if not all(isinstance(share, float) and 0.0 < share < 1.0 for share in shares):
        return images  # refused later, with its name
    return int(images * (1.0 - sum(shares))) - 2 * len(classes)


def _say(defaults: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    given = flattened(asked)
    # A space that is written out stands there as the paths below it.
    groups = {path.partition(".")[0] for path in given}
    chosen = [f"{k}={v}" for k, v in flattened(defaults).items() if k not in given.keys() | groups]
    if not chosen:
        return []
    return [f"Defaults for this machine ({this_machine().describe()}): {', '.join(chosen)}"]
