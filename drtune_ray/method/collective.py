"""The other processes that train the same trial, for the few places of the method that need them.

Whatever the number of processes, a step equals that of one process: each holds the whole bank in
the same order, and the work on its rows is divided. The equations know nothing of this. A trainer
of several processes gives a finished method its collective from outside
(``method.collective = drtune_ray.training.distributed.ProcessGroup()``); without one every
operation below is that of a process alone and changes nothing.
Legend: W processes, N rows of all of them, K bank rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drtune_ray.method.class_rows import ClassRows, class_counts
from drtune_ray.method.precision import at_least_float32
from drtune_ray.method.rotation import Rotation


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch whose gradients are accumulated: it alone is in memory.

    Attributes:
        num_rows: N, number of rows of the whole batch in all processes.
        is_last: Whether the batch is complete with this part.
    """

    num_rows: int
    is_last: bool


@dataclass(frozen=True)
class Shard:
    """The part that one process has of N rows.

    Attributes:
        own: Slice of the rows at hand that are the work of this process.
        shares: Number of rows of each process, in the order of the ranks.
        micro: Place of these rows in their batch, if they are a part of it.
    """

    own: slice
    shares: Sequence[int]
    micro: MicroBatch | None = None

    @property
    def num_rows(self) -> int:
        """N, the number of rows of all processes and all parts of the batch."""
        return sum(self.shares) if self.micro is None else self.micro.num_rows

    @property
    def is_last(self) -> bool:
        """Whether the batch is complete with these rows."""
        return self.micro is None or self.micro.is_last

    @property
    def divisor(self) -> float:
        """N / W, by which each process divides the sum over its own rows.

        Averaging over the processes, as data-parallel training does to gradients, then yields the
        mean over all rows, however unevenly they are divided.
        """
        return self.num_rows / len(self.shares)


class Collective:
    """The processes of one trial; this class is a process alone.

    Several processes override `rank`, `world_size`, `sum`, `gather_rows` and `broadcast`. Every
    process calls the same operations in the same order.

    Attributes:
        rank: Index of this process, from 0.
        world_size: W, the number of processes.
    """

    rank: int = 0
    world_size: int = 1

    # ---- what several processes override

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the processes."""
        return tensor

    def gather_rows(self, rows: Tensor, shares: Sequence[int]) -> Tensor:
        """Rows of all processes, (N, ...), in the order of the ranks.

        Args:
            rows: Rows of this process.
            shares: Number of rows of each process, known to all: no device is asked for it.
        """
        return rows

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0; shapes and dtypes agree."""
        return tensor

    # ---- what the method calls

    def batch(
        self,
        num_rows: int,
        shares: Sequence[int] | None = None,
        micro: MicroBatch | None = None,
    ) -> Shard:
        """The part of the global batch whose rows this process was given.

        Args:
            num_rows: Number of rows at hand. There are more than this process's share only where
                a process without rows of its own runs a spare row to keep its graph.
            shares: Number of rows of each process; may be left out by a process alone.
            micro: Place of the rows of all processes in their batch, if they are a part of it.

        Raises:
            ValueError: If several processes train and no shares are given, or they cannot be.
        """
        if shares is None and self.world_size > 1:
            raise ValueError(
                f"shares is needed with {self.world_size} processes: pass how many rows of "
                "the global batch each of them has"
            )
        shares = [num_rows] if shares is None else list(shares)
        if len(shares) != self.world_size or shares[self.rank] > num_rows:
            raise ValueError(
                f"shares must hold one number of rows for each of {self.world_size} processes, "
                f"here at most {num_rows}, but got shares={shares} in process {self.rank}"
            )
        return Shard(slice(shares[self.rank]), shares, micro)

    def block(self, num_rows: int) -> Shard:
        """The block of the bank's rows that is this process's work.

        Consecutive rows; the numbers of two processes differ by one at most.
        """
        bounds = [num_rows * rank // self.world_size for rank in range(self.world_size + 1)]
        shares = [bounds[rank + 1] - bounds[rank] for rank in range(self.world_size)]
        return Shard(slice(bounds[self.rank], bounds[self.rank + 1]), shares)

    def mean(self, rows: Tensor, num_rows: int) -> Tensor:
        """Mean over the rows of all processes, the same in each: (rows, D) -> (D,).

        Args:
            rows: Rows of this process.
            num_rows: N.
        """
        return rows.mean(0) if self.world_size == 1 else self.sum(rows.sum(0)) / num_rows

    def class_rows(self, labels: Tensor, num_classes: int) -> ClassRows:
        """This process's block of the bank's rows by class; their softmax is that of all rows.

        Args:
            labels: Labels of all K rows.
            num_classes: C.
        """
        if self.world_size == 1:
            return ClassRows(labels, num_classes)
        return _DividedClassRows(labels, num_classes, self)

    def solved_once(self, solve: Callable[[], Rotation], like: Rotation) -> Rotation:
        """The rotation that the first process solves for all: one message.

        Args:
            solve: Computes it; called in the first process alone.
            like: A rotation of the same shapes and dtypes.
        """
        rotation = solve() if self.rank == 0 else like
        if self.world_size == 1:
            return rotation
        parts = [part for part in rotation if part is not None]
        message = self.broadcast(torch.cat([part.reshape(-1) for part in parts]))
        received = iter(torch.split(message, [part.numel() for part in parts]))
        return rotation.map(lambda part: next(received).view_as(part))

    def gathered_batch(
        self, pretrained: Tensor, downstream: Tensor, labels: Tensor, batch: Shard, bank_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The global batch for the bank, in the order of the ranks: one message.

        Rows that those behind them would push out of the bank at once do not travel.

        Args:
            pretrained: z^p of this process's rows, shape (rows, D).
            downstream: z^d, shape (rows, D).
            labels: Shape (rows,).
            batch: This process's part of the batch.
            bank_size: K.
        """
        if self.world_size == 1:
            return pretrained, downstream, labels
        skipped = _surplus(batch.shares, bank_size)
        kept = [share - skip for share, skip in zip(batch.shares, skipped, strict=True)]
        # Labels travel as numbers of the same kind; float32 is exact up to 2^24 classes.
        message = torch.cat(
            [at_least_float32(rows) for rows in (pretrained, downstream, labels.unsqueeze(1))],
            dim=1,
        )[skipped[self.rank] :]
        width = pretrained.shape[1]
        rows = self.gather_rows(message, kept)
        pretrained, downstream, numbers = torch.split(rows, [width, width, 1], dim=1)
        return pretrained, downstream, numbers.squeeze(1).long()


ALONE = Collective()


class _DividedClassRows(ClassRows):
    """One process's block of rows by class.

    Counts and softmax are those of all rows; sums and means are this block's terms, to be summed
    over the processes.
    """

    def __init__(self, labels: Tensor, num_classes: int, collective: Collective) -> None:
        own = labels[collective.block(len(labels)).own]
        super().__init__(own, num_classes, class_counts(labels, num_classes))
        self._collective = collective

    def _normalised(
        self, exponentials: Tensor, maxima: Tensor, totals: Tensor, temperature: float
    ) -> Tensor:
        """Divide by the totals of all processes, whose exponentials have other maxima.

        One exchange of 2 C numbers a process; a class of which a process has no row counts 0.
        """
        own = torch.stack([maxima, totals]).unsqueeze(0)
        shares = [1] * self._collective.world_size
        all_maxima, all_totals = self._collective.gather_rows(own, shares).unbind(1)
        factors = ((all_maxima - all_maxima.amax(0)) / temperature).exp()
        exponentials = exponentials * factors[self._collective.rank][self.labels]
        return exponentials / (all_totals * factors).sum(0)[self.labels]


def _surplus(shares: Sequence[int], bank_size: int) -> list[int]:
    """Number of each process's first rows that those behind them would push out of the bank."""
    left, skipped = max(0, sum(shares) - bank_size), []
    for share in shares:
        skipped.append(min(share, left))
        left -= skipped[-1]
    return skipped
