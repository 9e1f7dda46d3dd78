"""The feature banks of DR-Tune: paired features of the last K training images.

DR-Tune (Zhou et al., ICCV 2023, https://arxiv.org/abs/2308.12058), sections 3.3 and 3.4.
Legend: B batch rows, K bank rows, D feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureBank(nn.Module):
    """First-in-first-out queue of (pretrained features, downstream features, label).

    The two banks M^p and M^d of the paper hold features of the *same* images, so they are one
    queue with one write position. Only rows that were written are returned. A row with a feature
    that is not finite is stored as zeros and counted, so that nothing computed from the bank
    becomes NaN. All state is in ``state_dict``: rows, labels, write position, fill count and the
    count of such rows.

    Differs from the authors' code: any K and any batch may be combined (theirs needs K to be a
    multiple of B), and the bank starts empty instead of with random rows labelled 1.

    Args:
        bank_size: K, number of rows kept.
        num_features: D, width of a feature.

    Raises:
        ValueError: If ``bank_size`` or ``num_features`` is below 1.
    """

    pretrained: Tensor
    downstream: Tensor
    labels: Tensor
    num_nonfinite: Tensor

    def __init__(self, bank_size: int, num_features: int) -> None:
        super().__init__()
        if bank_size < 1:
            raise ValueError(f"bank_size >= 1 must hold, but got bank_size={bank_size}")
        if num_features < 1:
            raise ValueError(f"num_features >= 1 must hold, but got num_features={num_features}")
        self.bank_size = bank_size
        self.register_buffer("pretrained", torch.zeros(bank_size, num_features))
        self.register_buffer("downstream", torch.zeros(bank_size, num_features))
        self.register_buffer("labels", torch.zeros(bank_size, dtype=torch.long))
        self.register_buffer("num_nonfinite", torch.zeros((), dtype=torch.long))
        # Plain integers, so that reading them never waits for an accelerator.
        self._position = 0
        self._num_rows = 0

    def get_extra_state(self) -> dict[str, int]:
        """Write position and fill count, for ``state_dict``."""
        return {"position": self._position, "num_rows": self._num_rows}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self._position, self._num_rows = state["position"], state["num_rows"]

    def __len__(self) -> int:
        """Number of filled rows."""
        return self._num_rows

    @torch.no_grad()
    def enqueue(self, pretrained: Tensor, downstream: Tensor, labels: Tensor) -> None:
        """Append rows and drop the oldest; of more than K rows the last K are kept.

        Args:
            pretrained: z^p, shape (B, D).
            downstream: z^d of the same images, shape (B, D).
            labels: Shape (B,).

        Raises:
            ValueError: If the shapes disagree.
        """
        expected = (len(labels), self.pretrained.shape[1])
        if pretrained.shape != expected or downstream.shape != expected:
            raise ValueError(
                "pretrained, downstream and labels must be (B, D), (B, D) and (B,) with "
                f"D={expected[1]}, but got {tuple(pretrained.shape)}, {tuple(downstream.shape)} "
                f"and {tuple(labels.shape)}"
            )
        is_finite = pretrained.isfinite().all(1, keepdim=True)
        is_finite &= downstream.isfinite().all(1, keepdim=True)
        self.num_nonfinite += (~is_finite).sum()
        pretrained = torch.where(is_finite, pretrained, 0.0)
        downstream = torch.where(is_finite, downstream, 0.0)
        num_kept = min(len(labels), self.bank_size)
        num_before_wrap = min(num_kept, self.bank_size - self._position)
        first = len(labels) - num_kept
        for stored, new in (
            (self.pretrained, pretrained),
            (self.downstream, downstream),
            (self.labels, labels),
        ):
            before, after = torch.split(new[first:], [num_before_wrap, num_kept - num_before_wrap])
            stored[self._position : self._position + num_before_wrap].copy_(before)
            stored[: len(after)].copy_(after)
        self._position = (self._position + num_kept) % self.bank_size
        self._num_rows = min(self._num_rows + num_kept, self.bank_size)

    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the filled rows, in no particular order, valid until the next `enqueue`.

        Returns:
            (pretrained (rows, D), downstream (rows, D), labels (rows,)).
        """
        filled = slice(len(self))
        return self.pretrained[filled], self.downstream[filled], self.labels[filled]

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the filled rows, oldest first.

        Returns:
            (pretrained (rows, D), downstream (rows, D), labels (rows,)).
        """
        # Until the bank is full the oldest row is the first; rolling by 0 copies.
        shift = -self._position if len(self) == self.bank_size else 0
        pretrained, downstream, labels = (rows.roll(shift, 0) for rows in self.stored())
        return pretrained, downstream, labels
