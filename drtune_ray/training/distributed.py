"""The process group of a trial; the only file that calls torch.distributed.

Without a group every function returns what a process alone computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drtune_ray.method.collective import Collective


class ProcessGroup(Collective):
    """torch's default process group at the time of construction; without one, a process alone."""

    def __init__(self) -> None:
        if is_distributed():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the processes."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather_rows(self, rows: Tensor, shares: Sequence[int]) -> Tensor:
        """Rows of all processes in the order of the ranks; `shares` are their numbers."""
        if self.world_size == 1:
            return rows
        longest = max(shares)
        if len(rows) < longest:  # collectives need equal shapes: pad to the longest, then cut
            padded = rows.new_zeros(longest, *rows.shape[1:])
            padded[: len(rows)] = rows
            rows = padded
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in shares]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)])

    def sum_in_order(self, tensor: Tensor) -> Tensor:
        """Elementwise sum in the order of the ranks: equal bit for bit in a message of any length.

        :meth:`sum` may add in an order that depends on the length.
        """
        if self.world_size == 1:
            return tensor
        parts = self.gather_rows(tensor.unsqueeze(0), [1] * self.world_size)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.broadcast(tensor, 0)
        return tensor


def is_distributed() -> bool:
    """Whether this process belongs to a group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Average the gradients of the module over the processes.

    Buffers, such as the bank, are not broadcast: each process keeps them equal by itself.
    """
    if not is_distributed():
        return module
    _ignore_intended()
    parallel = nn.parallel.DistributedDataParallel(
        _Settled(module),
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
    )
    parallel(None).backward()
    parallel.zero_grad(set_to_none=True)
    return parallel


class _Settled(nn.Module):
    """A module that can also be called without inputs, for a backward pass of no effect.

    DDP rebuilds its gradient buckets after its first backward pass, and their layout decides the
    order in which more than two processes are summed: a resumed run, whose first step is a
    different one, would differ from the unbroken run by rounding. After a pass of no effect the
    layout is final and the same in every run: gradients in the reverse order of the parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        """Call the module; for None return a zero that depends on every trained parameter."""
        if inputs != (None,):
            return self.module(*inputs)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        total = trained[0].sum()
        for parameter in trained[1:]:
            total = total + parameter.sum()
        return 0.0 * total


def _ignore_intended() -> None:
    """Silence the warnings about intended settings, which every worker of every trial repeats."""
    # `forward_sync_buffers` replaces it from torch 2.13, newer than the oldest supported release;
    # it differs only by one broadcast of the buffers, which are equal, at the start.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    # The strides of 1x1 convolutions in channels_last can be written in two ways; the gradient is
    # copied into the bucket in any case.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of the ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()
