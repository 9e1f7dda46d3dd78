"""From what a user asked for to a full configuration.

Precedence: ``--set`` > flags > file > defaults that fit the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from drtune_ray.config import DataConfig, StudyConfig, TrialConfig
from drtune_ray.data.sources import IMAGE_SUFFIXES
from drtune_ray.errors import ConfigError
from drtune_ray.search.machine import fitting_defaults, this_machine
from drtune_ray.section import not_a_mapping, validated
from drtune_ray.study_sections import ResourcesConfig
from drtune_ray.training.backbones import DEMO_BACKBONE
from drtune_ray.values import deep_merge, flattened, full_path, nested, parse_assignments, read_yaml

TRIAL_FLAGS = {
    "data_folder": "data.train",
    "backbone": "backbone.name",
    "weights": "backbone.weights",
    "epochs": "training.epochs",
    "image_size": "data.image_size",
    "workers": "training.workers",
    "preset": "preset",
}
STUDY_FLAGS = {
    "trials": "trials",
    "space": "space",
    "storage": "storage",
    "name": "name",
    "tracking_uri": "tracking.uri",
    "optuna_storage": "optuna_storage",
    "artifacts": "artifacts",
    "seed": "seed",
    "sampler": "sampler.name",
    "scheduler": "scheduler.name",
    "finalist_seeds": "finalists.num_seeds",
    "warm_start": "warm_start",
}


def study_request(
    study_file: Path | None, assignments: Iterable[str], flags: Mapping[str, Any]
) -> tuple[StudyConfig, list[str]]:
    """A study's configuration, and sentences about the defaults that were chosen.

    Args:
        study_file: YAML of a `StudyConfig`; None where flags say it all.
        assignments: ``path=value``; paths of the trial, or of the study.
        flags: Named as in `TRIAL_FLAGS` and `STUDY_FLAGS`, and ``seed``; None is not given.

    Raises:
        ConfigError: Naming every problem.
    """
    asked = read_yaml(study_file, with_lines=True) if study_file else {}
    asked = deep_merge(asked, nested(_given(STUDY_FLAGS, flags)))
    asked["trial"] = deep_merge(_mapping(asked, "trial"), nested(_trial_values(flags)))
    for path, value in parse_assignments(assignments).items():
        is_of_study = path.split(".")[0] in StudyConfig.model_fields
        asked = deep_merge(asked, nested({path if is_of_study else f"trial.{path}": value}))
    trial = _mapping(asked, "trial")
    folder = _data_folder(trial, "trial.")
    asked.setdefault("name", _name_of(folder))
    defaults = _fitted(fitting_defaults(this_machine()), trial, folder, "trial.")
    defaults["resources"] = _fitting_resources(defaults, _mapping(asked, "resources"))
    config = StudyConfig.from_mapping(deep_merge(defaults, asked))
    return config, _say(defaults, asked)


def trial_request(
    trial_file: Path | None, assignments: Iterable[str], flags: Mapping[str, Any]
) -> tuple[TrialConfig, ResourcesConfig, list[str]]:
    """As :func:`study_request`, for a single training: its configuration and a worker's share.

    The file may hold ``resources`` beside the settings of the trial, as a study's does.
    """
    trial = read_yaml(trial_file) if trial_file else {}
    trial = deep_merge(trial, nested(_trial_values(flags)))
    trial = deep_merge(trial, nested(parse_assignments(assignments)))
    asked = _mapping(trial, "resources")
    trial.pop("resources", None)
    folder = _data_folder(trial)
    defaults = _fitted(fitting_defaults(this_machine()), trial, folder)
    preset = trial.pop("preset", None)
    config = TrialConfig.from_mapping(deep_merge(defaults["trial"], trial), preset=preset)
    fitting = _fitting_resources(defaults, asked)
    resources = validated(ResourcesConfig, fitting | dict(asked), "resources.")
    said = _say({"trial": defaults["trial"]}, {"trial": trial})
    return config, resources, said


def _given(names: Mapping[str, str], flags: Mapping[str, Any]) -> dict[str, Any]:
    return {path: flags[flag] for flag, path in names.items() if flags.get(flag) not in (None, ())}


def _trial_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    values = _given(TRIAL_FLAGS, flags)
    if flags.get("seed") is not None:
        values |= {"seed": flags["seed"], "data.view_seed": flags["seed"]}
    return values


def _mapping(values: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    """A group of settings.

    Args:
        values: Hold it, or not.
        key: Its name.
        prefix: What to show before the name.

    Raises:
        ConfigError: If it is something else.
    """
    group = values.get(key) or {}
    if not isinstance(group, Mapping):
        raise ConfigError(not_a_mapping(prefix + key, group))
    return group


def _data_folder(trial: Mapping[str, Any], prefix: str = "") -> Path:
    folder = _mapping(trial, "data", prefix).get("train")
    if not folder:
        raise ConfigError(
            "data.train is missing: give --data DIR, a folder with one folder of images a class"
        )
    return full_path(str(folder))


def default_name(config: TrialConfig) -> str:
    """A name from the folder of images."""
    return _name_of(full_path(config.data.train))


def _name_of(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-._") or "study"


def _fitted(
    defaults: dict[str, Any], trial: Mapping[str, Any], folder: Path, prefix: str = ""
) -> dict[str, Any]:
    """Defaults that agree with what was asked for."""
    backbone = _mapping(trial, "backbone", prefix)
    name, weights = backbone.get("name"), backbone.get("weights")
    chosen: dict[str, Any] = {}
    if name and name != defaults["trial"]["backbone"]["name"]:
        chosen["trial.backbone.weights"] = "timm"
    if weights == "demo" and not name:
        chosen["trial.backbone.name"] = DEMO_BACKBONE
    size = defaults["trial"]["training"]["batch_size"]
    num_train = _num_train_at_least(folder, _mapping(trial, "data"))
    while size > max(num_train, 2):
        size //= 2
    chosen["trial.training.batch_size"] = size
    return deep_merge(defaults, nested(chosen))


def _fitting_resources(defaults: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Default resources that do not say otherwise what was asked for."""
    replaced = "gpus_per_worker" if "gpus_per_trial" in asked else None
    return {key: value for key, value in defaults["resources"].items() if key != replaced}


def _num_train_at_least(folder: Path, data: Mapping[str, Any]) -> int:
    """Images that training gets for sure; the real count is known after the scan."""
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
    chosen = [f"{k}={v}" for k, v in flattened(defaults).items() if k not in given]
    if not chosen:
        return []
    return [f"Defaults for this machine ({this_machine().describe()}): {', '.join(chosen)}"]
