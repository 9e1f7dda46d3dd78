"""One trial as a generator: its caller decides what happens between epochs.

Ray Train's worker, the resident Tune actor, a script and a test drive the same
:func:`train_epochs`, which knows nothing of studies, Tune or MLflow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import TrainingData
from drtune_ray.training.backbones import Backbone
from drtune_ray.training.reports import DIVERGED, EpochReport, SavePoint
from drtune_ray.training.trial import Trial


def train_epochs(
    config: TrialConfig,
    data: TrainingData,
    backbone: Backbone,
    *,
    resume: dict[str, Any] | None = None,
    device: torch.device | None = None,
    num_threads: int | None = None,
    save_requested: Callable[[], bool] = lambda: False,
    on_progress: Callable[[], None] = lambda: None,
) -> Iterator[EpochReport | SavePoint]:
    """Train one configuration, yielding after every epoch and at save points.

    The same seed and number of threads give the same losses bit for bit, in a fresh process or
    in one that trained other configurations before. In a process group every process calls this
    with the same arguments and takes part in every `save`.

    Args:
        config: Configuration of the trial.
        data: Training and validation images.
        backbone: Pretrained encoder.
        resume: Checkpoint of the same trial, as `TrialFolder.newest` returns it.
        device: Device to train on. Default: the CPU.
        num_threads: Number of torch's threads; None leaves it unchanged.
        save_requested: Function called at every step; if it returns True in any process, a
            `SavePoint` follows the step (on CUDA devices of several processes, `LAG` steps later).
        on_progress: Function called before every batch, also in validation and bank warm-up. A
            training that has not called it for long is stuck.

    Yields:
        An `EpochReport` for each epoch, the last with an outcome; a `SavePoint` in between when
        requested or ``training.save_every_seconds`` after the last save.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    trial = Trial(config, data, backbone, device or torch.device("cpu"), on_progress)
    if resume is None:
        trial.warm_up_bank()
    else:
        trial.load_state(resume)
    try:
        while trial.progress.outcome is None:
            yield from _train_one_epoch(trial, save_requested)
            yield trial.report()
            trial.is_best = False
            trial.writer.write_in_background()
    finally:
        trial.writer.wait()
    if resume is not None and not trial.has_trained:
        yield trial.report()  # it had already ended: report the outcome again


def _train_one_epoch(trial: Trial, save_requested: Callable[[], bool]) -> Iterator[SavePoint]:
    config, progress = trial.config.training, trial.progress
    started, last_save = time.monotonic(), time.monotonic()
    trial.has_trained = True

    def wants_save() -> bool:
        return time.monotonic() - last_save > config.save_every_seconds or save_requested()

    for is_finite in trial.steps(wants_save):
        if not is_finite:
            progress.outcome = DIVERGED
            return
        if trial.signals.take_save() and not trial.signals.has_diverged():
            progress.epoch_seconds += time.monotonic() - started
            started = last_save = time.monotonic()
            yield SavePoint(
                progress.epochs_done, progress.steps_done, trial.writer.save, trial.writer.settle
            )
    progress.epoch_seconds += time.monotonic() - started
    trial.finish_epoch()
