"""Knowing that a training has diverged, without making the device wait at every step."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from drtune_ray.training.distributed import ProcessGroup

# Steps by which a CUDA device may run ahead of the host: it never idles for an answer, and the
# answer comes at the same step in every process.
LAG = 2


class FiniteWatch:
    """Collects each step's `is_finite`, over all processes, and tells once one was false.

    On a CUDA device `LAG` steps later, or when asked to wait; elsewhere at once.

    Args:
        group: The processes of the trial.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._flags: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._has_diverged = False

    def add(self, is_finite: Tensor) -> None:
        """Take the flag of a step: a boolean scalar on the device."""
        num_broken = self._group.sum((~is_finite).float())
        if num_broken.device.type != "cuda":
            self._flags.append((num_broken, None))
            return
        # To pinned memory, behind the step's own work on the stream: the host does not wait.
        copied = torch.empty((), pin_memory=True).copy_(num_broken, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(num_broken.device))
        self._flags.append((copied, event))

    def has_diverged(self, *, wait: bool = False) -> bool:
        """Whether a step was not finite.

        Args:
            wait: Count the newest steps too, which an accelerator may still be working on.
        """
        while self._flags and (wait or self._flags[0][1] is None or len(self._flags) > LAG):
            copied, event = self._flags.popleft()
            if event is not None:
                event.synchronize()
            self._has_diverged |= bool(copied)
        return self._has_diverged
