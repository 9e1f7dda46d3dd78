"""What a study is: its identity, what decides its results, and who drives it."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

import drtune_ray
from drtune_ray.config import StudyConfig, flattened, read_yaml, to_yaml
from drtune_ray.errors import ConfigError, EnvironmentProblem

STUDY_FILE = "study.yaml"
# Raised when a change of the package changes the numbers that a trial gives.
NUMERIC_VERSION = 1
# Settings that may differ between two runs of the same study.
NOT_DECIDING = (
    "name",
    "storage",
    "trials",
    "resources",
    "tracking",
    "trial.data.train",
    "trial.data.loader_workers",
    "trial.data.cache_limit_gib",
    "trial.backbone.weights",
    "trial.training.save_every_seconds",
)


@dataclass(frozen=True)
class StudyRecord:
    """The file that makes a folder a study.

    Attributes:
        study_id: Unique; marks its runs in MLflow.
        config: The resolved configuration of the latest run.
        deciding: What decides the results: flat settings and hashes of data and weights.
    """

    study_id: str
    config: StudyConfig
    deciding: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write into the study's folder."""
        content = {
            "study_id": self.study_id,
            "drtune_ray_version": drtune_ray.__version__,
            "config": self.config.to_mapping(),
            "deciding": self.deciding,
        }
        temporary = folder / f".{STUDY_FILE}.tmp"
        temporary.write_text(to_yaml(content))
        temporary.replace(folder / STUDY_FILE)


def read_record(folder: Path) -> StudyRecord:
    """The study in a folder.

    Raises:
        ConfigError: If the folder holds none.
    """
    if not (folder / STUDY_FILE).exists():
        raise ConfigError(f"{folder} is not a study: it holds no {STUDY_FILE}")
    content = read_yaml(folder / STUDY_FILE)
    return StudyRecord(
        content["study_id"], StudyConfig.from_mapping(content["config"]), content["deciding"]
    )


def find_study(name_or_folder: str, storage: str) -> Path:
    """The folder of a study given as a folder or as a name under the storage.

    Raises:
        ConfigError: Naming the studies that there are.
    """
    base = Path(storage).expanduser().resolve()
    for folder in (Path(name_or_folder).expanduser().resolve(), base / name_or_folder):
        if (folder / STUDY_FILE).exists():
            return folder
    there = sorted(path.parent.name for path in base.glob(f"*/{STUDY_FILE}"))
    raise ConfigError(
        f"there is no study {name_or_folder!r} under {base}"
        + (f"; there are {there}" if there else "")
        + ": give its name and --storage, or its folder"
    )


def deciding_values(config: StudyConfig, data_digest: str, weights_digest: str) -> dict[str, Any]:
    """Everything that decides the results of a study, flat."""
    flat = flattened(config.to_mapping())
    kept = {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(name + ".") for name in NOT_DECIDING)
    }
    return kept | {
        "content of the images and splits": data_digest,
        "content of the pretrained weights": weights_digest,
        "numeric version of drtune-ray": NUMERIC_VERSION,
    }


def open_record(config: StudyConfig, deciding: dict[str, Any]) -> StudyRecord:
    """The study of this name: a new one, or the present one if it decides the same.

    Raises:
        ConfigError: If the name is taken by another configuration, with the differences.
    """
    folder = config.folder
    if not (folder / STUDY_FILE).exists():
        record = StudyRecord(f"{config.name}-{uuid.uuid4().hex[:12]}", config, deciding)
        record.write(folder)
        return record
    former = read_record(folder)
    differences = [
        f"  {key}: {former.deciding.get(key)!r} there, {deciding.get(key)!r} here"
        for key in sorted(former.deciding.keys() | deciding.keys())
        if former.deciding.get(key) != deciding.get(key)
    ]
    if differences:
        raise ConfigError(
            f"study {config.name!r} under {config.storage} was begun with another configuration; "
            "give this one another --name, or repeat the former command:\n" + "\n".join(differences)
        )
    record = StudyRecord(former.study_id, config, former.deciding)
    record.write(folder)
    return record


@contextmanager
def driver_lease(folder: Path) -> Iterator[None]:
    """Be the study's only driver.

    Raises:
        EnvironmentProblem: If another process drives it, naming the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder_file = folder / "driver.txt"
    # The operating system releases the lock of a killed driver.
    lock = filelock.FileLock(folder / "driver.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        holder = holder_file.read_text() if holder_file.exists() else "another process"
        raise EnvironmentProblem(
            f"study {folder.name!r} is being run by {holder}: wait for it or end it first"
        ) from None
    try:
        holder_file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()
