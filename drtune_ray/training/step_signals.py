"""Flags that the processes of a trial exchange at every step, without making a device wait."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from drtune_ray.training.distributed import ProcessGroup

# Number of steps by which the flags of a CUDA device are read late: the device never idles for
# them, and every process reads them at the same step.
LAG = 2


class StepSignals:
    """Two flags a step over all processes: a loss was not finite, a process requests a save.

    Both travel in one message of two numbers. On a CUDA device they are known `LAG` steps later or
    after waiting; elsewhere at once. A process alone knows its own request at once.

    Args:
        group: Processes of the trial.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._has_diverged, self._save_is_due = False, False

    def add(self, is_finite: Tensor, wants_save: bool = False) -> None:
        """Add the flags of a step.

        Args:
            is_finite: Boolean scalar on the device.
            wants_save: Whether this process requests a save point.
        """
        self._save_is_due |= wants_save and self._group.world_size == 1
        broken = (~is_finite).float()
        # Filled on the device: copying a number from the host would make it wait.
        flags = self._group.sum(torch.stack([broken, torch.full_like(broken, float(wants_save))]))
        if flags.device.type != "cuda":
            self._pending.append((flags, None))
            return
        # Copied to pinned memory after the step's work on the stream: the host does not wait.
        copied = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(flags.device))
        self._pending.append((copied, event))

    def has_diverged(self, *, wait: bool = False) -> bool:
        """Whether the loss of a step was not finite.

        Args:
            wait: Include the newest steps, which an accelerator may still be computing.
        """
        self._read(wait)
        return self._has_diverged

    def take_save(self) -> bool:
        """Whether a save point is due; the call clears all requests so far."""
        self._read(wait=False)
        if not self._save_is_due:
            return False
        self._read(wait=True)
        self._save_is_due = False
        return True

    def _read(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][1] is None or len(self._pending) > LAG):
            flags, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            num_broken, num_wishes = flags.tolist()
            self._has_diverged |= num_broken > 0
            self._save_is_due |= num_wishes > 0
