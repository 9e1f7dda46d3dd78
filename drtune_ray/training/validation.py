"""Validation metrics of a classifier, from sums over any number of batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_BINS = 15  # confidence bins, as in Guo et al., "On calibration of modern neural networks", 2017


class ValidationTotals:
    """Sums from which all metrics follow; the sums of several processes are added.

    Args:
        num_classes: C, number of classes.
        device: Device of the logits.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        sizes = [1, num_classes, num_classes, NUM_BINS, NUM_BINS]
        self.sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        # Views of one tensor, so that it can be summed over processes in one message.
        parts = torch.split(self.sums, sizes)
        self._loss, self._correct, self._count, self._confidence, self._hits = parts

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, C) and labels (B,)."""
        logits = logits.double()
        confidence, predicted = logits.softmax(1).max(1)
        is_correct = (predicted == labels).double()
        self._loss += F.cross_entropy(logits, labels, reduction="sum")
        self._correct.index_add_(0, labels, is_correct)
        self._count.index_add_(0, labels, torch.ones_like(is_correct))
        # Bins are open on the left; a loss that is not finite shows in `val_loss`.
        bins = (confidence.nan_to_num() * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
        self._confidence.index_add_(0, bins, confidence)
        self._hits.index_add_(0, bins, is_correct)

    def measures(self, sums: Tensor) -> dict[str, float]:
        """Accuracy, cross-entropy, accuracy of the worst class and expected calibration error.

        Args:
            sums: Elementwise total of `sums` over all processes.
        """
        self.sums.copy_(sums)
        total = self._count.sum()
        seen = self._count > 0
        calibration_error = (self._confidence - self._hits).abs().sum() / total
        return {
            "val_accuracy": float(self._correct.sum() / total),
            "val_loss": float(self._loss[0] / total),
            "val_worst_class_accuracy": float((self._correct[seen] / self._count[seen]).min()),
            "val_calibration_error": float(calibration_error),
        }
