"""The record of a study or training: its identity, configuration and end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import drtune_ray
from drtune_ray.config.section import validated
from drtune_ray.config.study import RECORD_FILE as RECORD_FILE
from drtune_ray.config.study import StudyConfig, TrackingConfig
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.folders import LocalFolder, open_folder
from drtune_ray.values import full_path, read_yaml, to_yaml

# What lies in the folder of a study or training beside its record.
JOURNAL_NAME, SPLITS_NAME = "optuna.journal", "splits.parquet"
TRIALS_NAME, EPOCHS_NAME = "trials.parquet", "epochs.parquet"
WINNER_NAME, SPOOL_NAME, TRIALS_FOLDER = "winner", "spool", "trials"
REPORT_NAME = "report.html"
DONE_NAME = "done"  # written last
SCRATCH_NAME = ".tune"  # Ray's own folders; nothing in them is needed again


# Types of the values of a record.
KINDS: dict[str, Any] = {
    "study_id": str,
    "kind": str,
    "config": dict,
    "deciding": dict,
    "tracking": dict,
    "artifacts": str | None,
}


@dataclass(frozen=True)
class Record:
    """The file that makes a folder a study, or a single training.

    Attributes:
        folder: Folder of the study or training.
        study_id: Unique id, which also marks its runs in MLflow.
        kind: `STUDY` or `TRAINING`.
        config: Resolved configuration of the latest run, as plain values.
        deciding: What decides the results: flat settings, and hashes of data and weights.
        tracking: `TrackingConfig` of the latest run, as plain values.
        artifacts: URI of the artifacts of the latest run; None if it kept all files here.
    """

    folder: Path
    study_id: str
    kind: str
    config: dict[str, Any]
    deciding: dict[str, Any]
    tracking: dict[str, Any]
    artifacts: str | None = None

    def write(self) -> None:
        """Write the record to its folder."""
        content = {
            "kind": self.kind,
            "study_id": self.study_id,
            "drtune_ray_version": drtune_ray.__version__,
            "config": self.config,
            "deciding": self.deciding,
            "tracking": self.tracking,
            "artifacts": self.artifacts,
        }
        LocalFolder(self.folder).write(RECORD_FILE, to_yaml(content).encode())


def read_record(folder: Path) -> Record:
    """Read the record of the study or training in a folder.

    Raises:
        ConfigError: If the folder holds none.
        EnvironmentProblem: If its file is damaged.
    """
    if not (folder / RECORD_FILE).exists():
        raise ConfigError(f"{folder} is not a study: it holds no {RECORD_FILE}")
    content = _read_yaml(folder / RECORD_FILE)
    names = ("study_id", "kind", "config", "deciding", "tracking")
    if missing := [name for name in names if name not in content]:
        raise ConfigError(
            f"{folder / RECORD_FILE} was not written by drtune-ray (it lacks {missing}): give the "
            "study another --name or --storage"
        )
    values = {name: content[name] for name in names} | {"artifacts": content.get("artifacts")}
    if wrong := [name for name, value in values.items() if not isinstance(value, KINDS[name])]:
        raise _damaged(folder / RECORD_FILE, f"wrong value of {wrong}")
    try:
        validated(TrackingConfig, values["tracking"], "tracking.")
    except ConfigError as error:
        raise _damaged(folder / RECORD_FILE, error) from None
    return Record(folder, **values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except ConfigError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, reason: object) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{path} is damaged ({reason}): bring it back from MLflow (study/study.yaml of the study's "
        "run) or from a backup"
    )


def recorded_config(folder: Path, kind: str, uri: str | None) -> dict[str, Any]:
    """Return the configuration in the record of a study or training; empty if there is none.

    Args:
        folder: Its folder under the storage.
        kind: `STUDY` or `TRAINING`.
        uri: URI of the artifacts, which hold the record if this disk does not.

    Raises:
        ConfigError: If the record is damaged.
        OSError: If the artifacts hold no record or cannot be reached.
    """
    if (folder / RECORD_FILE).exists():
        record = read_record(folder)
    elif uri:
        with TemporaryDirectory() as temporary:
            copy = Path(temporary)
            open_folder(uri).below(folder.name).download(RECORD_FILE, copy / RECORD_FILE)
            record = read_record(copy)
    else:
        return {}
    is_one = record.kind == kind and isinstance(record.config, dict)
    return record.config if is_one else {}


def find_study(name_or_folder: str, storage: str) -> Path:
    """Find the folder of a study, given as a folder or as a name under the storage.

    Raises:
        ConfigError: If there is none; names the studies that exist.
    """
    base = full_path(storage)
    for folder in (full_path(name_or_folder), base / name_or_folder):
        if (folder / RECORD_FILE).exists():
            return folder
    there = [path.name for path in _studies(base)]
    raise ConfigError(
        f"there is no study {name_or_folder!r} under {base}"
        + (f"; there are {there}" if there else "")
        + ": give its name and --storage, or its folder"
    )


def find_studies(storage: str) -> list[Path]:
    """Return the folders of the studies and trainings under a storage, by name.

    Raises:
        ConfigError: If there are none.
    """
    base = full_path(storage)
    if found := _studies(base):
        return found
    raise ConfigError(f"{base} holds no study: give the --storage of your studies")


def _studies(base: Path) -> list[Path]:
    return sorted(path.parent for path in base.glob(f"*/{RECORD_FILE}"))


def write_done(config: StudyConfig, num_trials: int) -> None:
    """Record that a study with these limits is done; written last.

    Args:
        config: The study.
        num_trials: Number of trials with a result.
    """
    content = json.dumps(_limits(config) | {"num_trials": num_trials}, indent=1)
    LocalFolder(config.folder).write(DONE_NAME, content.encode())


def is_done(folder: Path, config: StudyConfig, num_trials: int | None = None) -> bool:
    """Return whether a run with the same limits finished.

    Args:
        folder: Folder of the study.
        config: The study.
        num_trials: Number of trials with a result now; None if not known yet.
    """
    try:
        done = json.loads((folder / DONE_NAME).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(done, dict):  # of a former version
        return False
    num_then = done.get("num_trials")
    return done == _limits(config) | {"num_trials": num_then} and num_trials in (None, num_then)


def _limits(config: StudyConfig) -> dict[str, object]:
    """Return the settings whose change continues a study that is done."""
    limits = ("trials", "budget", "finalists", "final_fit")
    return {key: value for key, value in config.to_mapping().items() if key in limits}
