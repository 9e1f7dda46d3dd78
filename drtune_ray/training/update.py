"""The update of the weights by the gradients of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from drtune_ray.method import Method
from drtune_ray.training.optim import learning_rates
from drtune_ray.training.weight_average import WeightAverage


class Updater:
    """Sums the gradients of the parts of a batch, then takes one step with them.

    Where several processes train, the gradients are the averaged ones when :meth:`apply` is called,
    so that each clips by the norm of the global batch's gradient.

    Args:
        method: Method that is trained, whose hooks are called around each step.
        optimizer: Optimiser.
        schedule: Learning-rate schedule.
        scaler: Scaler of the loss, which skips the steps whose gradients overflowed.
        clip_norm: Largest norm of the gradient; None for no limit.
        average: Average of the weights, if there is one.
    """

    def __init__(
        self,
        method: Method,
        optimizer: Optimizer,
        schedule: LRScheduler,
        scaler: torch.amp.GradScaler,
        clip_norm: float | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.method = method
        self.optimizer, self.schedule, self.scaler = optimizer, schedule, scaler
        self.clip_norm, self.average = clip_norm, average
        self.rates: dict[str, float] = {}
        self._accumulates = False

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the batch so far."""
        if not self._accumulates:
            self.optimizer.zero_grad(set_to_none=True)
        self._accumulates = True
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def apply(self) -> bool:
        """Update the weights; return False, and leave all else alone, if that was skipped."""
        self._accumulates = False
        self.scaler.unscale_(self.optimizer)
        if self.clip_norm is not None:
            groups = self.optimizer.param_groups
            clip_grad_norm_([p for group in groups for p in group["params"]], self.clip_norm)
        self.method.before_step()
        is_taken = self._step()
        self.method.after_step(is_taken)
        if not is_taken:
            return False
        self.rates = learning_rates(self.optimizer)
        self.schedule.step()
        if self.average is not None:
            self.average.update()
        return True

    def _step(self) -> bool:
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # A skipped step lowers the scale, and nothing else does.
        return self.scaler.get_scale() >= scale
