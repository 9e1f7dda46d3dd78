"""Batches in parts, whose gradients are accumulated.

A batch is cut into consecutive parts, and each part is divided among the processes as a batch is;
gathering the parts one after another restores the batch's order, which is the bank's. The method
weighs each row by the size of the whole batch, adds the regularization with the last part, and
enters all rows into the bank then: an optimiser step counts once, whatever the number of parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drtune_ray.method import MethodOutput
from drtune_ray.method.collective import MicroBatch


def micro_batches(
    batches: Sequence[list[int]], batch_size: int, num_parts: int
) -> tuple[list[list[int]], list[MicroBatch]]:
    """Cut batches into parts; return the rows of each part and its place in its batch.

    Args:
        batches: Rows of each batch, for all processes together.
        batch_size: Rows of a batch that is not the last one of its epoch.
        num_parts: Number of parts of such a batch; a shorter one has fewer.
    """
    parts, places = [], []
    longest = -(-batch_size // num_parts)
    for batch in batches:
        count = -(-len(batch) // longest)
        bounds = [len(batch) * at // count for at in range(count + 1)]
        for at in range(count):
            parts.append(batch[bounds[at] : bounds[at + 1]])
            places.append(MicroBatch(len(batch), is_last=at == count - 1))
    return parts, places


def synchronisation(module: nn.Module, place: MicroBatch) -> AbstractContextManager[None]:
    """Return a context in which several processes average the gradients with the last part only."""
    if place.is_last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


class StepTotals:
    """What the parts of a batch gave, summed: the numbers of one training step."""

    def __init__(self) -> None:
        self.loss = torch.zeros(())
        self._values: list[Tensor] = []
        self._is_finite: list[Tensor] = []

    def add(self, output: MethodOutput, num_correct: Tensor) -> None:
        """Add the loss, its parts and the number of correctly classified rows of a part.

        `loss` is that of this part, to call ``backward`` on.
        """
        self.loss = output.loss
        values = [output.loss.detach(), *output.parts.values(), num_correct]
        self._values.append(torch.stack([value.double() for value in values]))
        self._is_finite.append(output.is_finite)

    @property
    def is_finite(self) -> Tensor:
        """Whether all losses and features so far were finite: a boolean scalar on the device."""
        found = self._is_finite[0]
        for is_finite in self._is_finite[1:]:
            found = found & is_finite
        return found

    def take(self) -> Tensor:
        """Return the sums: loss, parts of the loss, correct rows; and forget them."""
        total = self._values[0]
        for values in self._values[1:]:
            total = total + values
        self._values, self._is_finite = [], []
        return total
