"""Checkpoints of a trial, from which it resumes exactly where it stopped.

A checkpoint holds its own checksum and the identity of its trial, appears under its name only when
it is complete, and is verified before a byte of it is used. The newest two and the weights of the
best epoch are kept.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from drtune_ray.config.metric import Metric
from drtune_ray.config.trial import TRIAL_NOT_DECIDING, TrialConfig, deciding_settings
from drtune_ray.errors import CheckpointError
from drtune_ray.folders import Folder, LocalFolder
from drtune_ray.training.distributed import ProcessGroup, gather_objects
from drtune_ray.values import digest

logger = logging.getLogger(__name__)

MAGIC = b"drtune-ray checkpoint 1\n"
NUM_KEPT = 2
BEST_NAME = "best.ckpt"
IDENTITY = "trial"  # key of the trial's identity in a checkpoint
# Key, beside the weights of the best epoch, of class and predicted class of each validation image:
# (N, 2), or None without such images. Version 0.1.0 did not write it.
ANSWERS = "answers"


def trial_identity(config: TrialConfig, *of_what: str) -> str:
    """Return a digest that identifies a trial; its checkpoints carry it.

    Args:
        config: Configuration of the trial. Paths and the number of workers do not count, since
            they may change between two runs.
        of_what: Names of the trial, its images and its pretrained weights.
    """
    return recorded_identity(config.to_mapping(), *of_what)


def recorded_identity(values: Mapping[str, Any], *of_what: str) -> str:
    """Return the identity of a trial by its configuration as it was recorded.

    That configuration lacks the settings that the package has got since then.

    Args:
        values: Configuration of the trial, as plain values.
        of_what: See :func:`trial_identity`.
    """
    return digest(of_what, deciding_settings(values, TRIAL_NOT_DECIDING))


def check_best(
    best: dict[str, Any],
    path: Path,
    identity: str | None,
    metric: Metric,
    value: float | None,
) -> None:
    """Check that weights are those of a trial's best epoch, before they are handed over.

    Args:
        best: Content of the file.
        path: The file.
        identity: Identity of the trial; None leaves it unchecked.
        metric: Metric that chose the epoch.
        value: Best value of the trial; None if it had no images for validation.

    Raises:
        CheckpointError: If they are not.
    """
    reason = None
    if not {"model", "record"} <= best.keys():
        reason = "it is another kind of checkpoint"
    elif identity not in (None, best.get(IDENTITY)):
        reason = "they are of another trial or configuration"
    elif value is not None:
        found = best["record"]["metrics"].get(metric.best, math.nan)
        if not math.isclose(found, value, rel_tol=1e-9):
            reason = f"their {metric.label} is {found}, and {value} is recorded"
    if reason is not None:
        raise CheckpointError(
            f"{path} does not hold the weights of its trial's best epoch: {reason}; bring the "
            f"right file back from MLflow (checkpoint/{BEST_NAME} of the trial's run) or from a "
            "backup, and repeat the command"
        )


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically, checksum first."""
    LocalFolder(path.parent).write(path.name, *_encoded(state))


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state whose tensors are copies on the CPU, which a later step does not change.

    It takes as much memory of the host as the state has, until it is written.
    """

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu", copy=True)
        return {key: copy(of) for key, of in value.items()} if isinstance(value, dict) else value

    return {key: copy(value) for key, value in state.items()}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint; tensors arrive on the CPU.

    Raises:
        CheckpointError: If the file is missing, torn or not one of ours.
    """
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{error}: remove it") from None


class TrialFolder:
    """The checkpoints of one trial.

    Args:
        path: Folder of the trial, created at the first write.
        artifacts: Folder that holds the checkpoints instead, so that they outlive this machine's
            disk.
    """

    def __init__(self, path: Path, artifacts: Folder | None = None) -> None:
        self.path = path
        self._artifacts = artifacts
        self._files: Folder = artifacts or LocalFolder(path)
        self._identity: str | None = None

    @property
    def best(self) -> Path:
        """File of the best epoch's weights; :meth:`fetch_best` downloads it from artifacts."""
        return self.path / BEST_NAME

    def fetch_best(self) -> Path:
        """Return the file of the best epoch's weights, downloaded to this machine if need be.

        Raises:
            FileNotFoundError: If there are none.
        """
        if self._artifacts is not None:
            self._artifacts.download(BEST_NAME, self.best)
        return self.best

    def begin(self, identity: str) -> dict[str, Any] | None:
        """Claim the folder for a trial: remove temporary files and find the checkpoint to resume.

        All processes of a trial call it and get the same checkpoint.

        Args:
            identity: Identity of the trial, stored in the checkpoints saved from now on.

        Returns:
            The newest sound checkpoint of the trial, if there is one. Unsound ones are logged and
            removed.

        Raises:
            OSError: If checkpoints exist and none can be read: the trial must not start over.
        """
        self._identity = identity
        is_first = ProcessGroup().rank == 0
        if is_first:
            self._files.remove_leftovers()
        found = self._newest_sound(identity, remove=True) if is_first else None
        name = gather_objects(found[0] if found else None)[0]
        if found is not None or name is None:
            return found[1] if found else None
        return self._read(name, identity)

    def save(self, state: dict[str, Any], epoch: int, step: int) -> None:
        """Write a checkpoint taken after `step` steps of the epoch that follows `epoch`."""
        name = f"epoch-{epoch:05d}-step-{step:07d}.ckpt"
        self._files.write(name, *_encoded(state | {IDENTITY: self._identity}))
        for outdated in self._newest_first()[NUM_KEPT:]:
            self._files.remove(outdated)

    def save_best(self, state: dict[str, Any]) -> None:
        """Replace the weights of the best epoch."""
        self._files.write(BEST_NAME, *_encoded(state | {IDENTITY: self._identity}))

    def newest(self) -> dict[str, Any] | None:
        """Return the newest sound checkpoint of any trial; unsound ones are skipped."""
        found = self._newest_sound(None, remove=False)
        return found[1] if found else None

    def drop_resumable(self) -> None:
        """Remove what only an unfinished trial needs; the best weights stay."""
        self._files.remove_leftovers()
        for name in self._newest_first():
            self._files.remove(name)

    def _newest_first(self) -> list[str]:
        return [name for name in reversed(self._files.names()) if name.startswith("epoch-")]

    def _newest_sound(
        self, identity: str | None, *, remove: bool
    ) -> tuple[str, dict[str, Any]] | None:
        unreadable: OSError | None = None
        for name in self._newest_first():
            try:
                return name, self._read(name, identity)
            except CheckpointError as error:
                logger.warning("%s; the one before it is used", error)
                if remove:  # its name may sort after those of checkpoints to come
                    self._files.remove(name)
            except OSError as error:
                unreadable = error
                address = self._files.address(name)
                logger.warning("cannot read checkpoint %s: %s", address, error)
        if unreadable is not None:
            raise unreadable
        return None

    def _read(self, name: str, identity: str | None) -> dict[str, Any]:
        address = self._files.address(name)
        state = _decoded(self._files.read(name), address)
        if identity is not None and state.get(IDENTITY) != identity:
            raise CheckpointError(f"checkpoint {address} belongs to another trial or configuration")
        return state


def trial_folder(trials: Path, number: int, artifacts: Folder | None = None) -> TrialFolder:
    """Return the folder of a numbered trial.

    Args:
        trials: Folder that holds those of all trials of a study.
        number: Number of the trial.
        artifacts: Folder that holds the checkpoints of all trials instead.
    """
    return named_folder(trials, folder_name(number), artifacts)


def named_folder(trials: Path, name: str, artifacts: Folder | None = None) -> TrialFolder:
    """Return the folder of a training outside the numbered trials; see :func:`trial_folder`."""
    return TrialFolder(trials / name, artifacts.below(name) if artifacts else None)


def folder_name(number: int) -> str:
    """Name of the folder of a trial."""
    return f"{number:05d}"


def _encoded(state: dict[str, Any]) -> tuple[bytes, memoryview]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    return MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n", payload


def _decoded(content: bytes, address: str) -> dict[str, Any]:
    header, checksum_end = len(MAGIC), len(MAGIC) + 64
    if content[:header] != MAGIC:
        raise CheckpointError(f"{address} is not a drtune-ray checkpoint")
    payload = memoryview(content)[checksum_end + 1 :]
    if hashlib.sha256(payload).hexdigest().encode() != content[header:checksum_end]:
        raise CheckpointError(f"checkpoint {address} is torn (its checksum differs)")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds for what is not its own or refused
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {address} holds more than tensors and plain values")
    return state
