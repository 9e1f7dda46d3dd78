"""What the method asks of the other processes that train the same trial.

The method itself knows no process group. A trainer that runs several processes passes an object
with these few operations (`drtune_ray.training.distributed.ProcessGroup`); a notebook passes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Collective(Protocol):
    """Operations over the processes of one trial; each is called by all of them in step."""

    @property
    def rank(self) -> int:
        """This process's index, from 0."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the processes."""

    def gather_rows(self, rows: Tensor, shares: Sequence[int]) -> Tensor:
        """Rows of all processes, (rows, ...), in the order of the ranks.

        Args:
            rows: Of this process.
            shares: How many rows each process has; known to all, so that no device is asked.
        """

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0; shapes and dtypes agree."""


class OneProcess:
    """The answers of a process that trains alone."""

    rank = 0
    world_size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather_rows(self, rows: Tensor, shares: Sequence[int]) -> Tensor:
        """The rows themselves."""
        return rows

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


def own_block(num_rows: int, collective: Collective) -> slice:
    """The rows that are this process's work: consecutive, their numbers differ by one at most."""
    rank, world_size = collective.rank, collective.world_size
    return slice(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)
