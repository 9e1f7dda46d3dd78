"""A trial's folder: everything it needs to go on exactly where it stopped.

A checkpoint file carries its own checksum, appears under its name only when it is complete, and
is verified before a byte of it is used. The newest two are kept, and the best epoch's weights.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch

from drtune_ray.errors import CheckpointError

logger = logging.getLogger(__name__)

MAGIC = b"drtune-ray checkpoint 1\n"
NUM_KEPT = 2
BEST_NAME = "best.ckpt"


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically, checksum first."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
        file.write(MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n")
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint; tensors arrive on the CPU.

    Raises:
        CheckpointError: If the file is missing, torn or not one of ours.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from None
    header, checksum_end = len(MAGIC), len(MAGIC) + 64
    if content[:header] != MAGIC:
        raise CheckpointError(f"{path} is not a drtune-ray checkpoint: remove it")
    payload = memoryview(content)[checksum_end + 1 :]
    if hashlib.sha256(payload).hexdigest().encode() != content[header:checksum_end]:
        raise CheckpointError(f"checkpoint {path} is torn (its checksum differs): remove it")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


class TrialFolder:
    """The checkpoints of one trial.

    Args:
        path: The trial's folder; made when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def best(self) -> Path:
        """Weights of the best epoch."""
        return self.path / BEST_NAME

    def save(self, state: dict[str, Any], epoch: int, step: int) -> None:
        """Write a checkpoint taken after `step` steps of the epoch that follows `epoch`."""
        write_checkpoint(self.path / f"epoch-{epoch:05d}-step-{step:07d}.ckpt", state)
        for outdated in self._newest_first()[NUM_KEPT:]:
            outdated.unlink(missing_ok=True)

    def save_best(self, state: dict[str, Any]) -> None:
        """Replace the weights of the best epoch."""
        write_checkpoint(self.best, state)

    def newest(self) -> dict[str, Any] | None:
        """The newest sound checkpoint; unsound ones are named in the log and passed over."""
        for path in self._newest_first():
            try:
                return read_checkpoint(path)
            except CheckpointError as error:
                logger.warning("%s; the one before it is used", error)
        return None

    def drop_resumable(self) -> None:
        """Remove what only an unfinished trial needs; the best weights stay."""
        for path in self._newest_first():
            path.unlink(missing_ok=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.path.glob("epoch-*.ckpt"), reverse=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
