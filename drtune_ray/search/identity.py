"""What a study is: its identity, what decides its results, and who drives it."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

import drtune_ray
from drtune_ray.config.study import TrackingConfig
from drtune_ray.config.trial import TRIAL_NOT_DECIDING
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.values import flattened_without, full_path, read_yaml, to_yaml

RECORD_FILE = "study.yaml"
# What else lies in the folder of a study or training.
JOURNAL_NAME, SPLITS_NAME, TRIALS_NAME = "optuna.journal", "splits.parquet", "trials.parquet"
WINNER_NAME, SPOOL_NAME, TRIALS_FOLDER = "winner", "spool", "trials"
DONE_NAME = "done"  # written last
SCRATCH_NAME = ".tune"  # Ray's own folders; nothing in them is needed again
# Raised when a change of the package changes the numbers that a trial gives.
NUMERIC_VERSION = 2
# Settings that may differ between two runs of the same study, or of the same training.
NOT_DECIDING = (
    "name",
    "storage",
    "optuna_storage",
    "artifacts",
    "trials",
    "budget",
    "finalists",
    "final_fit",
    "resources",
    "tracking",
    *TRIAL_NOT_DECIDING,
    *(f"trial.{path}" for path in TRIAL_NOT_DECIDING),
)
DATA_DIGEST = "content of the images and splits"
WEIGHTS_DIGEST = "content of the pretrained weights"
NUMERICS = "numeric version of drtune-ray"
SEVERAL_WORKERS = "several workers a trial"
ADVICE = {
    SEVERAL_WORKERS: " (training.workers may change, but not between 1 and more than 1)",
}


@dataclass(frozen=True)
class Record:
    """The file that makes a folder a study, or a single training.

    Attributes:
        folder: Where it lies.
        study_id: Unique; marks its runs in MLflow.
        kind: `STUDY` or `TRAINING`.
        config: The resolved configuration of the latest run, as plain values.
        deciding: What decides the results: flat settings and hashes of data and weights.
        tracking: Where the latest run was recorded, as plain values of `TrackingConfig`.
        artifacts: URI of what the latest run kept elsewhere; None where everything lies here.
    """

    folder: Path
    study_id: str
    kind: str
    config: dict[str, Any]
    deciding: dict[str, Any]
    tracking: dict[str, Any]
    artifacts: str | None = None

    def write(self) -> None:
        """Write into the folder."""
        content = {
            "kind": self.kind,
            "study_id": self.study_id,
            "drtune_ray_version": drtune_ray.__version__,
            "config": self.config,
            "deciding": self.deciding,
            "tracking": self.tracking,
            "artifacts": self.artifacts,
        }
        temporary = self.folder / f".{RECORD_FILE}.tmp"
        temporary.write_text(to_yaml(content))
        temporary.replace(self.folder / RECORD_FILE)


def read_record(folder: Path) -> Record:
    """The study or training in a folder.

    Raises:
        ConfigError: If the folder holds none.
    """
    if not (folder / RECORD_FILE).exists():
        raise ConfigError(f"{folder} is not a study: it holds no {RECORD_FILE}")
    content = read_yaml(folder / RECORD_FILE)
    names = ("study_id", "kind", "config", "deciding", "tracking")
    if missing := [name for name in names if name not in content]:
        raise ConfigError(
            f"{folder / RECORD_FILE} was not written by drtune-ray (it lacks {missing}): give the "
            "study another --name or --storage"
        )
    values = {name: content[name] for name in names}
    return Record(folder, **values, artifacts=content.get("artifacts"))


def find_study(name_or_folder: str, storage: str) -> Path:
    """The folder of a study given as a folder or as a name under the storage.

    Raises:
        ConfigError: Naming the studies that there are.
    """
    base = full_path(storage)
    for folder in (full_path(name_or_folder), base / name_or_folder):
        if (folder / RECORD_FILE).exists():
            return folder
    there = sorted(path.parent.name for path in base.glob(f"*/{RECORD_FILE}"))
    raise ConfigError(
        f"there is no study {name_or_folder!r} under {base}"
        + (f"; there are {there}" if there else "")
        + ": give its name and --storage, or its folder"
    )


def deciding_values(
    config: Mapping[str, Any], data_digest: str, weights_digest: str
) -> dict[str, Any]:
    """Everything that decides the results of a study or training, flat."""
    kept = flattened_without(config, NOT_DECIDING)
    if "trial" in config:
        # One worker runs the authors' reference trial with local BatchNorm statistics, as their
        # code does; of several, each would see a part of the batch (`reference_config`).
        kept[SEVERAL_WORKERS] = config["trial"]["training"]["workers"] != 1
    return kept | {
        DATA_DIGEST: data_digest,
        WEIGHTS_DIGEST: weights_digest,
        NUMERICS: NUMERIC_VERSION,
    }


def former_record(folder: Path, kind: str, deciding: Mapping[str, Any]) -> Record | None:
    """What lies in the folder, if it decides the same; None if nothing does.

    Raises:
        ConfigError: If the name is taken by another configuration, with the differences.
    """
    if not (folder / RECORD_FILE).exists():
        return None
    former = read_record(folder)
    differences = [
        f"  {key}: {former.deciding.get(key)!r} there, {deciding.get(key)!r} here"
        + ADVICE.get(key, "")
        for key in sorted(former.deciding.keys() | deciding.keys())
        if former.deciding.get(key) != deciding.get(key)
    ]
    if former.kind != kind:
        differences = [f"  it is a {former.kind}, this is a {kind}"]
    if differences:
        raise ConfigError(
            f"the name {folder.name!r} under {folder.parent} is taken by another configuration; "
            "give this one another --name, or repeat the former command:\n" + "\n".join(differences)
        )
    return former


def open_record(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    deciding: dict[str, Any],
    tracking: TrackingConfig,
    artifacts: str | None = None,
) -> Record:
    """What lies in the folder if it decides the same, else a new record if the folder has none.

    Raises:
        ConfigError: If the name is taken by another configuration, with the differences.
    """
    former = former_record(folder, kind, deciding)
    place = tracking.model_dump(mode="json")
    if former is None:
        study_id = f"{folder.name}-{uuid.uuid4().hex[:12]}"
        record = Record(folder, study_id, kind, dict(config), deciding, place, artifacts)
    else:
        record = replace(former, config=dict(config), tracking=place, artifacts=artifacts)
    record.write()
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
