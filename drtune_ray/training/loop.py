"""One trial as a generator: whoever drives it decides what happens between epochs.

Ray Train's worker, the resident Tune actor, a script and a test drive the same
:func:`train_epochs`. It knows nothing of studies, Tune or MLflow.
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
        config: The trial.
        data: Training and validation images.
        backbone: The pretrained encoder.
        resume: A checkpoint of the same trial, as `TrialFolder.newest` gives it.
        device: Where to train; the CPU by default.
        num_threads: torch's threads; None leaves them.
        save_requested: Asked at every step; True in any process yields a `SavePoint` after it
            (on CUDA devices of several processes, `LAG` steps later).
        on_progress: Called before every batch, validation and bank warm-up included: a training
            that does not call it for long is stuck.

    Yields:
        An `EpochReport` for each epoch, the last with an outcome; `SavePoint` in between when
        asked or when ``training.save_every_seconds`` have passed since the last save.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    trial = Trial(config, data, backbone, device or torch.device("cpu"), on_progress)
    if resume is None:
        trial.warm_up_bank()
    else:
        trial.load_state(resume)
    while trial.progress.outcome is None:
        yield from _train_one_epoch(trial, save_requested)
        yield trial.report()
        trial.is_best = False
    if resume is not None and not trial.has_trained:
        yield trial.report()  # it had ended already: say again how


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
            yield SavePoint(progress.epochs_done, progress.steps_done, trial.save)
    progress.epoch_seconds += time.monotonic() - started
    trial.finish_epoch()
