"""Settings from a file, options and ``--set`` in one mapping; `study.resolve` adds defaults."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from drtune_ray.config.section import not_a_mapping
from drtune_ray.config.study import RECORD_FILE, STUDY, TRAINING, StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.folders import source_location
from drtune_ray.values import deep_merge, nested, parse_assignments, read_yaml

# Files that hold or list images; a study file is YAML.
SOURCE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".tar")
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
    "final_fit": "final_fit.images",
    "warm_start": "warm_start",
}


def merged_study(
    study_file: Path | None, assignments: Iterable[str], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the requested settings of a study, its name and images among them.

    Args:
        study_file: YAML of a `StudyConfig`, or the record in a study's folder; None without one.
        assignments: ``path=value``; paths of the trial, or of the study.
        flags: Values by the names in `TRIAL_FLAGS` and `STUDY_FLAGS`; None is not given.

    Raises:
        ConfigError: If it is not YAML, or names no images.
    """
    merged = read_settings(study_file, STUDY) if study_file else {}
    merged = deep_merge(merged, nested(_given(STUDY_FLAGS, flags)))
    merged["trial"] = deep_merge(mapping_of(merged, "trial"), nested(trial_values(flags)))
    for path, value in parse_assignments(assignments).items():
        is_of_study = path.split(".")[0] in StudyConfig.model_fields
        merged = deep_merge(merged, nested({path if is_of_study else f"trial.{path}": value}))
    merged.setdefault("name", name_of(data_source(mapping_of(merged, "trial"), "trial.")))
    return merged


def trial_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a trial that the flags give, by dotted path."""
    values = _given(TRIAL_FLAGS, flags)
    if flags.get("seed") is not None:
        values |= {"seed": flags["seed"], "data.view_seed": flags["seed"]}
    return values


def read_settings(path: Path, kind: str) -> Mapping[str, Any]:
    """Return the settings of a file, of the record of a study or training, or for a folder.

    Args:
        path: YAML file; the folder of a study or training, for its record; or a folder of images,
            for settings that name it.
        kind: `STUDY` or `TRAINING`, whichever the command runs.

    Raises:
        ConfigError: If it is not YAML, or the record of the other kind.
    """
    is_list = path.is_file() and path.name.lower().endswith(SOURCE_SUFFIXES)
    if path.is_dir() or is_list:
        if is_list or not (path / RECORD_FILE).exists():
            of_trial = {"data": {"train": str(path)}}
            return {"trial": of_trial} if kind == STUDY else of_trial
        path /= RECORD_FILE
    content = read_yaml(path, with_lines=True)
    if not {"kind", "config"} <= content.keys():
        return content
    if content["kind"] != kind:
        other = {STUDY: "train", TRAINING: "tune"}[kind]
        raise ConfigError(
            f"{path} is the record of a {content['kind']}: give it to `drtune-ray {other}`"
        )
    return mapping_of(content, "config")


def mapping_of(values: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    """Return a group of settings, empty where the values have none.

    Args:
        values: Settings that may hold the group.
        key: Name of the group.
        prefix: Text before the name in messages.

    Raises:
        ConfigError: If the value is no mapping.
    """
    group = values.get(key) or {}
    if not isinstance(group, Mapping):
        raise ConfigError(not_a_mapping(prefix + key, group))
    return group


def data_source(trial: Mapping[str, Any], prefix: str = "") -> str:
    """Return the source of images that a trial names: a full path or a URI.

    Raises:
        ConfigError: If it names none.
    """
    folder = mapping_of(trial, "data", prefix).get("train")
    if not folder:
        raise ConfigError(
            "data.train is missing: give --data DIR, a folder with one folder of images a class"
        )
    return source_location(str(folder))


def name_of(source: str) -> str:
    """Return a study's name, made from its source of images."""
    name = source.partition("?")[0].rstrip("/").rpartition("/")[2]
    if name.lower().endswith(SOURCE_SUFFIXES):
        name = name.rpartition(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "study"


def _given(names: Mapping[str, str], flags: Mapping[str, Any]) -> dict[str, Any]:
    return {path: flags[flag] for flag, path in names.items() if flags.get(flag) not in (None, ())}
