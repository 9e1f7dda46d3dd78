"""Validation metrics of a classifier, over any number of batches and processes.

All but the AUROC follow from sums. It compares every image with every other, so that the scores of
all images are gathered: an estimate from bins would choose between settings by the bins' width.
The classes are shared among the processes, and what is added up are whole numbers: any number of
processes gives the same value bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from drtune_ray.config.metric import DEFAULT_METRIC, NUM_BINS
from drtune_ray.method.collective import Collective

# Scores, images times classes, above which no AUROC is measured: 1 GiB on each process. Where
# another metric chooses, it costs about 1.5 s of one core an epoch at most (docs/searching.md).
MAX_SCORES, CHEAP_SCORES = 2**28, 10_000_000


def most_scores(metric: str) -> int:
    """Return up to how many scores the AUROC is measured where a metric chooses."""
    return MAX_SCORES if metric == "auroc" else CHEAP_SCORES


class ValidationTotals:
    """What all metrics follow from; that of several processes is combined.

    Args:
        num_classes: C, number of classes.
        num_images: N, number of validation images, of all processes together.
        device: Device of the logits.
        metric: Metric that chooses the best epoch; see :func:`most_scores`.

    Attributes:
        answers: Class and predicted class of each image, (N, 2), in the order of the ranks; those
            of all processes after `measures`.
    """

    answers: Tensor

    def __init__(
        self,
        num_classes: int,
        num_images: int,
        device: torch.device,
        metric: str = DEFAULT_METRIC,
    ) -> None:
        sizes = [1, num_classes, num_classes, num_classes, NUM_BINS, NUM_BINS]
        self._sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        # Views of one tensor, so that it can be summed over processes in one message.
        parts = torch.split(self._sums, sizes)
        self._loss, self._correct, self._count, self._predicted, self._confidence, self._hits = (
            parts
        )
        self._num_classes = num_classes
        self._has_auroc = num_images * num_classes <= most_scores(metric)
        self._scores = [torch.empty(0, num_classes, device=device)]
        self._answers = [torch.empty(0, 2, dtype=torch.long, device=device)]

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, C) and labels (B,)."""
        logits = logits.double()
        confidence, predicted = logits.softmax(1).max(1)
        is_correct = (predicted == labels).double()
        ones = torch.ones_like(is_correct)
        self._loss += F.cross_entropy(logits, labels, reduction="sum")
        self._correct.index_add_(0, labels, is_correct)
        self._count.index_add_(0, labels, ones)
        self._predicted.index_add_(0, predicted, ones)
        # Bins are open on the left; a loss that is not finite shows in `val_loss`.
        bins = (confidence.nan_to_num() * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
        self._confidence.index_add_(0, bins, confidence)
        self._hits.index_add_(0, bins, is_correct)
        if self._has_auroc:
            # Logarithms, because float32 keeps apart what rounds to a probability of 0 or 1.
            self._scores.append(logits.log_softmax(1).float())
        self._answers.append(torch.stack([labels, predicted], 1))

    def measures(self, collective: Collective, shares: Sequence[int]) -> dict[str, float]:
        """Metrics by name; averages over classes are over those that have images.

        Args:
            collective: The processes.
            shares: Number of images of each process.
        """
        self.answers = collective.gather_rows(torch.cat(self._answers), shares)
        wins = self._wins(collective, shares)
        self._sums.copy_(collective.sum(self._sums))
        total = self._count.sum()
        seen = self._count > 0
        recalls = self._correct[seen] / self._count[seen]
        # F1 = 2 TP / (2 TP + FP + FN)
        f1 = 2 * self._correct[seen] / (self._count[seen] + self._predicted[seen])
        calibration_error = (self._confidence - self._hits).abs().sum() / total
        return {
            "val_accuracy": float(self._correct.sum() / total),
            "val_loss": float(self._loss[0] / total),
            "val_balanced_accuracy": float(recalls.mean()),
            "val_macro_f1": float(f1.mean()),
            "val_worst_class_accuracy": float(recalls.min()),
            "val_calibration_error": float(calibration_error),
        } | self._auroc(wins)

    def _auroc(self, wins: Tensor) -> dict[str, float]:
        """Mean area under the ROC curve of one class against the rest; of two classes the second.

        Empty where it is not defined: all images are of one class, or there are too many scores.
        """
        if not self._has_auroc:
            return {}
        pairs = self._count * (self._count.sum() - self._count)
        is_defined = pairs > 0
        if self._num_classes == 2:  # the other differs by rounding alone
            is_defined[0] = False
        if not is_defined.any():
            return {}
        return {"val_auroc": float((wins[is_defined] / (2 * pairs[is_defined])).mean())}

    def _wins(self, collective: Collective, shares: Sequence[int]) -> Tensor:
        """Twice the number of pairs, by class, in which an image of the class scores above another.

        A tie counts half: the area under the ROC curve is their share (Hanley and McNeil, 1982).
        """
        wins = torch.zeros_like(self._count)
        if not self._has_auroc:
            return wins
        scores = collective.gather_rows(torch.cat(self._scores), shares).T.contiguous()
        labels = self.answers[:, 0]
        for index in range(collective.rank, self._num_classes, collective.world_size):
            is_mine, column = labels == index, scores[index]
            mine, others = column[is_mine], column[~is_mine].sort().values
            below = torch.searchsorted(others, mine)
            below_or_equal = torch.searchsorted(others, mine, right=True)
            wins[index] = (below + below_or_equal).sum()
        return collective.sum(wins)
