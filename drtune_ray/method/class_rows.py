"""Rows grouped by class: sums, means and softmax within each class, and a table by class.

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
    """Class of each of K rows.

    Args:
        labels: Label of each row, 0 to C - 1, shape (K,).
        num_classes: C.
        counts: Number of rows of each class, shape (C,), where the rows at hand are a part of
            them; by default these are counted.
    """

    def __init__(self, labels: Tensor, num_classes: int, counts: Tensor | None = None) -> None:
        own_counts = class_counts(labels, num_classes)
        self.labels, self.counts = labels, own_counts if counts is None else counts
        self._order = labels.argsort(stable=True)
        self._starts = own_counts.cumsum(0) - own_counts

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
        """1 / number of rows of the class of each row, shape (K,)."""
        return self.counts.to(dtype).reciprocal().index_select(0, self.labels)

    def softmax(self, scores: Tensor, temperature: float = 1.0) -> Tensor:
        """Softmax of the scores / temperature over the rows of each class: (K,) -> (K,).

        The maximum of the class is subtracted before the division, so no temperature overflows.
        """
        maxima = scores.new_full(self.counts.shape, -torch.inf)
        maxima = maxima.scatter_reduce(0, self.labels, scores, "amax")
        # A temperature that the precision cannot hold would be zero, and the best row's score 0/0.
        temperature = max(temperature, torch.finfo(scores.dtype).tiny)
        exponentials = ((scores - maxima[self.labels]) / temperature).exp()
        totals = self.sums(exponentials.unsqueeze(1), torch.ones_like(exponentials)).squeeze(1)
        return self._normalised(exponentials, maxima, totals, temperature)

    def _normalised(
        self, exponentials: Tensor, maxima: Tensor, totals: Tensor, temperature: float
    ) -> Tensor:
        """Divide each exponential, (K,), by the total of its class, (C,)."""
        return exponentials / totals[self.labels]

    def dot(self, rows: Tensor, table: Tensor) -> Tensor:
        """Dot product of each row with the table's row of its class: (K, D), (C, D) -> (K,)."""
        return torch.cat([own.mul_(block).sum(1) for block, own in self._blocks(rows, table)])

    def add_(self, rows: Tensor, table: Tensor) -> None:
        """Add to each row, in place, the table's row of its class: (K, D), (C, D)."""
        for block, own in self._blocks(rows, table):
            block += own

    def _blocks(self, rows: Tensor, table: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows at a time, with a new copy of the table's row of the class of each."""
        labels = torch.split(self.labels, BLOCK_ROWS)
        for block, own in zip(torch.split(rows, BLOCK_ROWS), labels, strict=True):
            yield block, table.index_select(0, own)


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Number of rows of each class, (C,)."""
    return labels.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(labels))
