"""Rows grouped by class: sums, means and softmax of each class, and its table's row for each row.

Nothing here waits for an accelerator: no shape depends on the labels.
Legend: K rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from drtune_ray.method.collective import Collective, OneProcess, own_block

# Rows for which a table's rows are gathered at a time: they stay in a processor's cache.
BLOCK_ROWS = 128


class ClassRows:
    """Which rows belong to which class.

    With several processes each works on its block of the rows (:func:`own_block`): K is then the
    length of the block, and what is summed or averaged over a class is this process's part of it,
    until :meth:`total` adds the parts.

    Args:
        labels: Of the rows of all processes, each from 0 to C - 1.
        num_classes: C.
        collective: The processes that divide the rows.
    """

    def __init__(
        self, labels: Tensor, num_classes: int, collective: Collective | None = None
    ) -> None:
        self.collective = collective or OneProcess()
        self.counts = _counts(labels, num_classes)
        self.labels = labels[own_block(len(labels), self.collective)]
        is_whole = self.collective.world_size == 1
        own_counts = self.counts if is_whole else _counts(self.labels, num_classes)
        self._order = self.labels.argsort(stable=True)
        self._starts = own_counts.cumsum(0) - own_counts

    def total(self, part: Tensor) -> Tensor:
        """The sum over the processes of what each has of it."""
        return self.collective.sum(part)

    def sums(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of each class's rows, always in the same order.

        Args:
            rows: Shape (K, D).
            weights: Shape (K,).

        Returns:
            Shape (C, D); zero for a class without rows.
        """
        sums: Tensor = F.embedding_bag(
            self._order,
            rows,
            self._starts,
            mode="sum",
            per_sample_weights=weights.index_select(0, self._order),
        )
        return sums

    def means(self, rows: Tensor) -> Tensor:
        """Mean of each class's rows: (K, D) -> (C, D); zero for a class without rows."""
        return self.sums(rows, self.plain_weights(rows.dtype))

    def plain_weights(self, dtype: torch.dtype) -> Tensor:
        """1 / number of rows of the own class over all processes, shape (K,)."""
        return self.counts.to(dtype).reciprocal().index_select(0, self.labels)

    def softmax(self, scores: Tensor, temperature: float = 1.0) -> Tensor:
        """Softmax of the scores / temperature over all rows of each class: (K,) -> (K,).

        The class's own maximum is subtracted before the division, so no temperature overflows.
        """
        maxima = scores.new_full(self.counts.shape, -torch.inf)
        maxima = maxima.scatter_reduce(0, self.labels, scores, "amax")
        # A temperature that the precision cannot hold would be zero, and the best row's score 0/0.
        temperature = max(temperature, torch.finfo(scores.dtype).tiny)
        weights = ((scores - maxima[self.labels]) / temperature).exp()
        totals = self.sums(weights.unsqueeze(1), torch.ones_like(weights)).squeeze(1)
        if self.collective.world_size > 1:
            factors, totals = self._over_processes(maxima, totals, temperature)
            weights = weights * factors[self.labels]
        return weights / totals[self.labels]

    def _over_processes(
        self, maxima: Tensor, totals: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """What this process's exponentials are multiplied by, and the totals over all, (C,) each.

        One exchange of 2 C numbers a process; a class of which a process has no row counts 0.
        """
        own = torch.stack([maxima, totals]).unsqueeze(0)
        shares = [1] * self.collective.world_size
        all_maxima, all_totals = self.collective.gather_rows(own, shares).unbind(1)
        factors = ((all_maxima - all_maxima.amax(0)) / temperature).exp()
        return factors[self.collective.rank], (all_totals * factors).sum(0)

    def dot(self, rows: Tensor, table: Tensor) -> Tensor:
        """Dot product of each row with its class's row of the table: (K, D), (C, D) -> (K,)."""
        return torch.cat([own.mul_(block).sum(1) for block, own in self._blocks(rows, table)])

    def add_(self, rows: Tensor, table: Tensor) -> None:
        """Add to each row, in place, its class's row of the table: (K, D), (C, D)."""
        for block, own in self._blocks(rows, table):
            block += own

    def _blocks(self, rows: Tensor, table: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows at a time, and for each of them a new copy of its class's row of the table."""
        labels = torch.split(self.labels, BLOCK_ROWS)
        for block, own in zip(torch.split(rows, BLOCK_ROWS), labels, strict=True):
            yield block, table.index_select(0, own)


def _counts(labels: Tensor, num_classes: int) -> Tensor:
    """Number of rows of each class, (C,)."""
    return labels.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(labels))
