"""Rows grouped by class: sums, means and softmax of each class, and its table's row for each row.

Nothing here waits for an accelerator: no shape depends on the labels.
Legend: K rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows for which a table's rows are gathered at a time: they stay in a processor's cache.
BLOCK_ROWS = 128


class ClassRows:
    """Which rows belong to which class.

    Args:
        labels: Shape (K,), each from 0 to C - 1.
        num_classes: C.
    """

    def __init__(self, labels: Tensor, num_classes: int) -> None:
        self.labels = labels
        self.counts = labels.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(labels))
        self._order = labels.argsort(stable=True)
        self._starts = self.counts.cumsum(0) - self.counts

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
        """1 / number of rows of the own class, shape (K,)."""
        return self.counts.to(dtype).reciprocal().index_select(0, self.labels)

    def softmax(self, scores: Tensor, temperature: float = 1.0) -> Tensor:
        """Softmax of the scores / temperature over the rows of each class: (K,) -> (K,).

        The class's own maximum is subtracted before the division, so no temperature overflows.
        """
        maxima = scores.new_full(self.counts.shape, -torch.inf)
        maxima = maxima.scatter_reduce(0, self.labels, scores, "amax")
        # A temperature that the precision cannot hold would be zero, and the best row's score 0/0.
        temperature = max(temperature, torch.finfo(scores.dtype).tiny)
        weights = ((scores - maxima[self.labels]) / temperature).exp()
        totals = self.sums(weights.unsqueeze(1), torch.ones_like(weights)).squeeze(1)
        return weights / totals[self.labels]

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
