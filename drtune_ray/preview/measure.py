"""Measure trials on this machine: `train_epochs` itself, in this process, on a sample's tables."""

from __future__ import annotations

import math
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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

MAX_SECONDS = 12.0  # training time of one configuration after its first step
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
        peak_bytes: Largest resident memory of the process; tables that it maps are in it.
        device_bytes: Largest memory of torch on a CUDA device; 0 on CPUs.
    """

    trials: tuple[Measured, ...]
    peak_bytes: float
    device_bytes: float


def measured(
    configs: Sequence[TrialConfig],
    tables: Tables,
    num_threads: int,
    device: str,
    slowdown: float = 1.0,
) -> Measurement:
    """Train each configuration for seconds, one after another, as a resident actor does.

    Args:
        configs: Trials that all read these tables.
        tables: The sample's tables.
        num_threads: torch's threads a worker.
        device: ``cpu`` or ``cuda``.
        slowdown: Time of a worker among those that run at the same time, over its time alone.

    Raises:
        EnvironmentProblem: If this machine cannot train one of them, with the reason.
    """
    former_threads = torch.get_num_threads()
    with suppress(OSError):  # forget the peak of what this process did before
        Path("/proc/self/clear_refs").write_text("5")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        with _memory_limit(is_wanted=device == "cpu"):
            trials = tuple(
                _measured_trial(config, tables, num_threads, torch.device(device), slowdown)
                for config in configs
            )
    except (RuntimeError, MemoryError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        message = f"the base configuration cannot be trained here: {reason}"
        raise EnvironmentProblem(message) from error
    finally:
        torch.set_num_threads(former_threads)
    device_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Measurement(trials, reported_bytes("/proc/self/status", "VmHWM"), device_bytes)


def free_memory() -> int:
    """Return the bytes that processes could take now without swapping."""
    return reported_bytes("/proc/meminfo", "MemAvailable")


def reported_bytes(file: str, name: str) -> int:
    """Return one of the sizes that the system reports.

    Raises:
        EnvironmentProblem: If it does not.
    """
    try:
        lines = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
        return 1024 * int(lines[name].split()[0])
    except (OSError, KeyError, ValueError) as error:
        raise EnvironmentProblem(f"{file} does not report {name}: {error}") from None


@contextmanager
def _memory_limit(*, is_wanted: bool) -> Iterator[None]:
    """Within, what exceeds the free memory raises; the system would kill this process for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if is_wanted and soft == resource.RLIM_INFINITY:
        limit = reported_bytes("/proc/self/status", "VmData") + free_memory()
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _measured_trial(
    config: TrialConfig, tables: Tables, num_threads: int, device: torch.device, slowdown: float
) -> Measured:
    backbone = read_backbone(tables.backbone)
    data = TrainingData(tables, config.data, backbone.normalization.interpolation)
    steps: list[float] = []
    validations: list[float] = []
    saves: list[float] = []
    with tempfile.TemporaryDirectory(prefix="drtune-preview-") as path:
        folder = TrialFolder(Path(path))
        first, last = math.inf, time.monotonic()
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
            first = min(first, now)
            is_over = now - first > MAX_SECONDS and len(steps) > MIN_STEPS
            if is_over or isinstance(event, EpochReport):
                event.save(folder)
                event.settle()  # the most that it costs: a part of it runs beside the next epoch
                saves.append(time.monotonic() - now)
            if is_over or len(validations) == MAX_EPOCHS:
                break
            last = time.monotonic()
        checkpoint_bytes = max(file.stat().st_size for file in folder.path.glob("epoch-*"))
    # The first steps, in which torch settles, are not typical; the first one contains the start.
    step_seconds = statistics.fmean(steps[len(steps) // 2 :])
    num_validation, batch_size = len(data.validation), config.training.batch_size
    derived_seconds = VALIDATION_SHARE * step_seconds * num_validation / batch_size
    return Measured(
        slowdown * max(0.0, steps[0] - step_seconds),
        slowdown * step_seconds,
        slowdown * min(validations, default=derived_seconds),
        slowdown * statistics.median(saves),
        float(checkpoint_bytes),
        float(best_weights_bytes(config, backbone, len(data.classes))),
    )


def best_weights_bytes(config: TrialConfig, backbone: Backbone, num_classes: int) -> int:
    """Return the size of the best weights: encoder and head, but for the file's own few bytes."""
    head_bytes = (backbone.num_features + 1) * num_classes * 4
    factor = 2 if config.training.precision == "float64" else 1
    return factor * (backbone.num_bytes + head_bytes)
