"""Saving and resuming of a trial: what checkpoints hold, and when they are written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drtune_ray.training.checkpoint import ANSWERS, TrialFolder, copied
from drtune_ray.training.distributed import barrier, gather_objects
from drtune_ray.training.model import classifier_state, derived_seed
from drtune_ray.training.weights_file import NORMALIZATION

if TYPE_CHECKING:
    from drtune_ray.training.trial import Trial

FROZEN_PREFIX = "pretrained_encoder."


@dataclass
class Progress:
    """Progress of a trial, as its checkpoints hold it."""

    epochs_done: int = 0
    steps_done: int = 0
    epoch_seconds: float = 0.0
    best_value: float | None = None
    best_epoch: int = 0
    outcome: str | None = None
    last_rates: dict[str, float] = field(default_factory=dict)
    step_values: list[list[float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Progress:
        """Return the progress that a checkpoint holds."""
        known = dict(values)
        if "best_val_accuracy" in known:  # of version 0.1.0: -1 before the first validation
            best = known.pop("best_val_accuracy")
            known["best_value"] = None if best < 0 else best
        return cls(**known)

    def copied(self) -> dict[str, Any]:
        """Return a copy that later steps and epochs do not change, as plain values."""
        lists = {"step_values": list(self.step_values), "history": list(self.history)}
        return dict(vars(self)) | lists

    def add_epoch(self, metrics: dict[str, float], steps: list[dict[str, float]]) -> None:
        """Record an epoch; the next one starts without steps."""
        self.history.append(
            {
                "epoch": self.epochs_done,
                "time_ms": int(time.time() * 1000),
                "metrics": metrics,
                "steps": steps,
            }
        )
        self.step_values, self.epoch_seconds = [], 0.0


class CheckpointWriter:
    """Writes the checkpoints of a trial, of which the first process writes the files.

    Args:
        trial: Its state is read when a checkpoint is written.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        # Folder for a checkpoint that is due, and the write that is under way.
        self._unsaved: TrialFolder | None = None
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    def save(self, folder: TrialFolder) -> None:
        """Write the checkpoint; after a best epoch, write its weights first."""
        self.save_later(folder)
        self.settle()

    def save_later(self, folder: TrialFolder) -> None:
        """Write the weights after a best epoch; leave the checkpoint to be written.

        A write that is under way ends first: when an epoch is reported, nothing is being written.

        Raises:
            OSError: If one of these writes failed.
        """
        self.wait()
        trial = self._trial
        trial.collect_steps()
        if trial.is_best and trial.group.rank == 0:
            folder.save_best(
                {
                    "model": classifier_state(*trial.evaluated),
                    "record": trial.progress.history[-1],
                    ANSWERS: trial.answers,
                    NORMALIZATION: asdict(trial.normalization),
                }
            )
        self._unsaved = folder

    def settle(self) -> None:
        """Write the checkpoint that is due, if there is one, and wait until it is on disk."""
        self.wait()
        if self._unsaved is not None:
            write = self._write_of(self._unsaved, trial_state(self._trial))
            self._unsaved = None
            if self._trial.group.rank == 0:
                write()
            barrier()

    def write_in_background(self) -> None:
        """Start to write the checkpoint that is due, from a copy of the state."""
        if self._unsaved is None:
            return
        state = trial_state(self._trial)
        if self._trial.group.rank == 0:
            self._writing = self._writer.submit(self._write_of(self._unsaved, copied(state)))
        self._unsaved = None

    def wait(self) -> None:
        """Wait for a write that is under way; raise its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write_of(self, folder: TrialFolder, state: dict[str, Any]) -> Callable[[], None]:
        progress = self._trial.progress
        return partial(folder.save, state, progress.epochs_done, progress.steps_done)


def trial_state(trial: Trial) -> dict[str, Any]:
    """Return what a resumed trial needs; every process calls this."""
    random_state = {"cpu": torch.get_rng_state()}
    if trial.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(trial.device)
    method = trial.method.state_dict()
    return {
        "method": {k: v for k, v in method.items() if not k.startswith(FROZEN_PREFIX)},
        "optimizer": trial.optimizer.state_dict(),
        "schedule": trial.schedule.state_dict(),
        "scaler": trial.updater.scaler.state_dict(),
        "progress": trial.progress.copied(),
        "random": gather_objects(random_state),
        **({} if trial.average is None else {"average": trial.average.state_dict()}),
    }


def load_state(trial: Trial, state: Mapping[str, Any]) -> None:
    """Give a trial the state that :func:`trial_state` returned."""
    own = {k for k in trial.method.state_dict() if k.startswith(FROZEN_PREFIX)}
    missing, unexpected = trial.method.load_state_dict(state["method"], strict=False)
    assert set(missing) <= own and not unexpected, (missing, unexpected)
    trial.optimizer.load_state_dict(state["optimizer"])
    trial.schedule.load_state_dict(state["schedule"])
    if state["scaler"]:  # empty after training with another precision or device
        trial.updater.scaler.load_state_dict(state["scaler"])
    if trial.average is not None:
        trial.average.load_state_dict(state["average"])
    trial.progress = Progress.of(state["progress"])
    _load_random_states(trial, state["random"])


def _load_random_states(trial: Trial, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Restore the random states of this rank; seed those that the checkpoint does not hold.

    These are all states of a rank that is new, and a CUDA device's after training on CPUs.
    """
    rank, progress = trial.group.rank, trial.progress
    at = (rank, progress.epochs_done, progress.steps_done)
    torch.manual_seed(derived_seed(trial.config.seed, "training", *at) % 2**32)
    known = states[rank] if rank < len(states) else {}
    if "cpu" in known:
        torch.set_rng_state(known["cpu"])
    if "cuda" in known and trial.device.type == "cuda":
        torch.cuda.set_rng_state(known["cuda"], trial.device)
