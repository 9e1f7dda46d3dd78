"""The process group of a trial; the only file that calls torch.distributed.

Every function gives the one-process answer where there is no group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ProcessGroup:
    """The `drtune_ray.method.collective.Collective` of torch's default process group."""

    @property
    def rank(self) -> int:
        """This process's rank."""
        return dist.get_rank() if is_distributed() else 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size() if is_distributed() else 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the processes."""
        if is_distributed():
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather_rows(self, rows: Tensor, shares: Sequence[int]) -> Tensor:
        """Rows of all processes in the order of the ranks; `shares` are their numbers."""
        if not is_distributed():
            return rows
        longest = max(shares)
        if min(shares) == longest:
            return self._gather(rows, self.world_size)
        # Collectives need equal shapes: pad to the longest share, then cut.
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = torch.split(self._gather(padded, self.world_size), longest)
        return torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)])

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0."""
        if is_distributed():
            tensor = tensor.clone()
            dist.broadcast(tensor, 0)
        return tensor

    @staticmethod
    def _gather(tensor: Tensor, world_size: int) -> Tensor:
        gathered = tensor.new_empty(world_size * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered


def is_distributed() -> bool:
    """Whether this process belongs to a group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Average the gradients of the module over the processes.

    Buffers (the bank among them) are not broadcast: each process keeps them equal by itself.
    """
    if not is_distributed():
        return module
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        # Otherwise the layout of the messages changes after the first step, and with it the order
        # in which a sum over more than two processes is taken: a resumed run, whose first step is
        # another one, would differ by rounding from the unbroken one.
        find_unused_parameters=dist.get_world_size() > 2,
    )


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes in the order of the ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()
