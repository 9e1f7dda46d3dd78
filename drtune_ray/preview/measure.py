"""Measure trials on this machine: `train_epochs` itself, in this process, on a sample's tables."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.training.backbones import Backbone, read_backbone
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.reports import DIVERGED, EpochReport, SavePoint

MAX_SECONDS = 12.0  # training time of one configuration; a step under way is finished
MIN_STEPS, MAX_EPOCHS = 3, 6
# Without gradients an image costs a third: the forward pass, but not the two of the backward pass.
VALIDATION_SHARE = 1 / 3


@dataclass(frozen=True)
class Measured:
    """Cost of one configuration on the sample.

    Attributes:
        begin_seconds: Time to build the trial and to fill its bank.
        step_seconds: Mean time of a step once torch has settled.
        validation_seconds: Time of one pass over the sample's validation images.
        save_seconds: Time to write a checkpoint and the best weights.
        checkpoint_bytes: Size of a checkpoint.
        best_bytes: Size of the best weights.
    """

    begin_seconds: float
    step_seconds: float
    validation_seconds: float
    save_seconds: float
    checkpoint_bytes: float
    best_bytes: float


@dataclass(frozen=True)
class Measurement:
    """Cost of each configuration, and the memory that all of them needed.

    Attributes:
        trials: One entry a configuration, in the given order.
        peak_bytes: Largest resident memory of this process; tables that it maps are in it.
        device_bytes: Largest memory of torch on a CUDA device; 0 on CPUs.
    """

    trials: tuple[Measured, ...]
    peak_bytes: float
    device_bytes: float


def measured(
    configs: Sequence[TrialConfig], tables: Tables, num_threads: int, device: str
) -> Measurement:
    """Train each configuration for seconds, one after another, as a resident actor does.

    Args:
        configs: Trials that all read these tables.
        tables: The sample's tables.
        num_threads: torch's threads a worker.
        device: ``cpu`` or ``cuda``.

    Raises:
        EnvironmentProblem: If this machine cannot train one of them, with the reason.
    """
    former_threads = torch.get_num_threads()
    try:
        trials = tuple(
            _measured_trial(c, tables, num_threads, torch.device(device)) for c in configs
        )
    except (RuntimeError, MemoryError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        message = f"the base configuration cannot be trained here: {reason}"
        raise EnvironmentProblem(message) from error
    finally:
        torch.set_num_threads(former_threads)
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    device_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Measurement(trials, peak_bytes, device_bytes)


def _measured_trial(
    config: TrialConfig, tables: Tables, num_threads: int, device: torch.device
) -> Measured:
    backbone = read_backbone(tables.backbone)
    data = TrainingData(tables, config.data, backbone.normalization.interpolation)
    steps, validations, saves = [], [], []
    with tempfile.TemporaryDirectory(prefix="drtune-preview-") as path:
        folder = TrialFolder(Path(path))
        started = last = time.monotonic()
        for event in train_epochs(
            config,
            data,
            backbone,
            device=device,
            num_threads=num_threads,
            save_requested=lambda: True,  # an event a step
        ):
            now = time.monotonic()
            has_step = isinstance(event, SavePoint) or event.outcome == DIVERGED
            (steps if has_step else validations).append(now - last)
            is_over = now - started > MAX_SECONDS and len(steps) > MIN_STEPS
            if is_over or isinstance(event, EpochReport):
                event.save(folder)
                saves.append(time.monotonic() - now)
            if is_over or len(validations) == MAX_EPOCHS:
                break
            last = time.monotonic()
        checkpoint_bytes = max(file.stat().st_size for file in folder.path.glob("epoch-*"))
    # The first steps, in which torch settles, are not typical; the first one contains the start.
    step_seconds = statistics.fmean(steps[len(steps) // 2 :])
    num_validation, batch_size = len(data.validation), config.training.batch_size
    return Measured(
        max(0.0, steps[0] - step_seconds),
        step_seconds,
        min(validations, default=VALIDATION_SHARE * step_seconds * num_validation / batch_size),
        statistics.median(saves),
        float(checkpoint_bytes),
        float(best_weights_bytes(config, backbone, len(data.classes))),
    )


def best_weights_bytes(config: TrialConfig, backbone: Backbone, num_classes: int) -> int:
    """Return the size of the best weights: encoder and head, but for the file's own few bytes."""
    head_bytes = (backbone.num_features + 1) * num_classes * 4
    factor = 2 if config.training.precision == "float64" else 1
    return factor * (backbone.num_bytes + head_bytes)
