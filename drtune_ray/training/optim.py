"""Parameter groups, optimisers and learning-rate schedules."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from drtune_ray.config.trial import OptimConfig

BACKBONE, HEAD = "backbone", "head"


def build_optimizer(
    encoder: nn.Module, head: nn.Module, config: OptimConfig, head_lr_multiplier: float
) -> Optimizer:
    """Build SGD or AdamW over two groups; the head's learning rate is a multiple of the backbone's.

    With AdamW biases and the affine parameters of normalisation layers have no weight decay, as is
    customary; with SGD all parameters have it, as in the paper's recipe (section 4.2).
    """
    groups = []
    for name, module, multiplier in (
        (BACKBONE, encoder, 1.0),
        (HEAD, head, head_lr_multiplier),
    ):
        parameters = [p for p in module.parameters() if p.requires_grad]
        spared = [p for p in parameters if p.ndim <= 1 and config.name == "adamw"]
        decayed = [p for p in parameters if p.ndim > 1 or config.name != "adamw"]
        rate = config.backbone_lr * multiplier
        groups.append(
            {"params": decayed, "lr": rate, "name": name, "weight_decay": config.weight_decay}
        )
        if spared:
            groups.append({"params": spared, "lr": rate, "name": name, "weight_decay": 0.0})
    if config.name == "adamw":
        return AdamW(groups)
    return SGD(groups, momentum=config.momentum, nesterov=config.nesterov)


def build_schedule(
    optimizer: Optimizer, config: OptimConfig, num_epochs: int, steps_per_epoch: int
) -> LambdaLR:
    """Build the schedule, a factor of all learning rates that is stepped after every training step.

    ``cosine`` falls from 1 to 0 step by step, ``cosine_per_epoch`` at the start of each epoch.
    """

    def factor(step: int) -> float:
        if config.schedule == "constant":
            return 1.0
        done = step / steps_per_epoch
        if config.schedule == "cosine_per_epoch":
            done = float(step // steps_per_epoch)
        return 0.5 * (1.0 + math.cos(math.pi * min(done / num_epochs, 1.0)))

    return LambdaLR(optimizer, factor)


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the present learning rates of backbone and head."""
    return {str(group["name"]): float(group["lr"]) for group in optimizer.param_groups}
