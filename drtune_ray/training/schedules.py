"""Learning-rate schedules, stepped after every training step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from drtune_ray.config.training import OptimConfig


def build_schedule(
    optimizer: Optimizer, config: OptimConfig, num_epochs: int, steps_per_epoch: int
) -> LambdaLR:
    """Build the schedule, a factor of all learning rates.

    During the warmup of W = `warmup_epochs` epochs it rises in equal steps from the first step's
    1 / (1 + number of steps in it) to 1. Then ``cosine`` and ``linear`` fall from 1 to 0 step by
    step over the epochs that are left, and ``cosine_per_epoch`` at the start of each epoch.
    ``step`` is multiplied by `step_gamma` after every `step_epochs` epochs, the warmup included.

    Args:
        optimizer: Optimiser, whose groups hold their full learning rates.
        config: Settings of the schedule.
        num_epochs: Epochs of the training.
        steps_per_epoch: Training steps of an epoch.
    """
    warmup_steps = config.warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return _after_warmup(config, step, num_epochs, steps_per_epoch)

    return LambdaLR(optimizer, factor)


def _after_warmup(config: OptimConfig, step: int, num_epochs: int, steps_per_epoch: int) -> float:
    if config.schedule == "constant":
        return 1.0
    epoch = step // steps_per_epoch
    if config.schedule == "step":
        return config.step_gamma ** (epoch // config.step_epochs)
    passed = float(epoch) if config.schedule == "cosine_per_epoch" else step / steps_per_epoch
    done = max(passed - config.warmup_epochs, 0.0) / (num_epochs - config.warmup_epochs)
    if config.schedule == "linear":
        return max(1.0 - done, 0.0)
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
