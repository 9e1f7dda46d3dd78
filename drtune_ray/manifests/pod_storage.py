"""Check that a study can resume in a cluster of pods: each retry of a RayJob is a new cluster.

Whatever a pod writes to its own disk is lost with it (DESIGN.md, decision 12).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from drtune_ray.config.study import StudyConfig
from drtune_ray.folders import is_object_uri

STORAGE_PATH = "/storage"
DATA_PATH = "/data"
STUDIES_PATH = f"{STORAGE_PATH}/studies"


def problems(
    config: StudyConfig, given: Mapping[str, Any], *, has_claim: bool, has_data_claim: bool
) -> Iterator[str]:
    """Yield a message for each thing that a pod would lose or not find.

    Args:
        config: The study.
        given: Settings of the study file, without defaults.
        has_claim: Whether a volume is mounted under ``/storage``.
        has_data_claim: Whether a volume is mounted under ``/data``.
    """
    if not has_claim and (missing := list(_missing_servers(config))):
        yield (
            f"study {config.name!r} would be on a pod's own disk, which is lost when a RayJob "
            "retries: give --claim NAME, a volume that all pods mount, or servers for "
            f"{', '.join(missing)}"
        )
    if "storage" in given and not _is_below(config.storage, STORAGE_PATH):
        yield (
            f"storage={config.storage!r} is not writable in a pod: leave it out, or put it below "
            f"{STORAGE_PATH}"
        )
    mounts = {STORAGE_PATH: has_claim, DATA_PATH: has_data_claim}
    for path, value in _files(config):
        if not any(_is_below(value, mount) for mount, is_there in mounts.items() if is_there):
            yield (
                f"{path}={value!r} does not exist in a pod: put the files on a volume, mount it "
                f"with --claim (under {STORAGE_PATH}) or --data-claim (under {DATA_PATH}), and set "
                "their path there"
            )


def _missing_servers(config: StudyConfig) -> Iterator[str]:
    """Yield the settings that name no server, so that a file on the pod's disk is used."""
    if (config.optuna_storage or "sqlite:").startswith("sqlite:"):
        yield "optuna_storage"
    if (config.artifacts or "file:").startswith("file:"):
        yield "artifacts"
    if not (config.tracking.uri or "").startswith(("http://", "https://")):
        yield "tracking.uri"


def _files(config: StudyConfig) -> Iterator[tuple[str, str]]:
    """Yield the settings of files that must exist in the driver's pod."""
    if not is_object_uri(config.trial.data.train):
        yield "data.train", config.trial.data.train
    if config.trial.backbone.weights not in ("timm", "demo"):
        yield "backbone.weights", config.trial.backbone.weights


def _is_below(path: str, folder: str) -> bool:
    return PurePosixPath(folder) in PurePosixPath(path).parents and ".." not in path.split("/")
