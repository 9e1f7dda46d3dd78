"""Classes of different sizes: how often their images are drawn, and what they weigh in the loss."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drtune_ray.config.trial import TrialConfig

Labels = NDArray[np.int64]


def loss_weights(config: TrialConfig, labels: Labels, num_classes: int) -> Tensor | None:
    """Return the weight of each class in the loss, (C,), or None where all weigh the same.

    n / (C n_c), as scikit-learn's `compute_class_weight` has it: the weights of the n training
    images sum to n. A class without images weighs nothing and is not among the C. Classes that are
    drawn equally often need no weights.
    """
    if config.training.class_weights == "none" or config.data.sampling == "class_balanced":
        return None
    counts = np.bincount(labels, minlength=num_classes)
    weights = len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))
    return torch.from_numpy(weights * (counts > 0))


def epoch_rows(labels: Labels, sampling: str, generator: torch.Generator) -> list[int]:
    """Return the rows of an epoch in their order: as many as there are training images.

    ``uniform``: each row once. ``class_balanced``: N / C draws of each class, one more in some of
    them if that is no whole number; within a class no image is drawn again before all others have
    been. The r-th repetition of row i of N is i + r N, which
    :meth:`~drtune_ray.data.dataset.TrainingData.training_batches` shows in another view.

    Args:
        labels: Class of each training image.
        sampling: ``uniform`` or ``class_balanced``.
        generator: Source of the order.
    """
    if sampling == "uniform":
        rows: list[int] = torch.randperm(len(labels), generator=generator).tolist()
        return rows
    drawn = torch.cat(_class_balanced(labels, generator))
    drawn = drawn[torch.randperm(len(drawn), generator=generator)]
    return _counted_on(drawn.tolist(), len(labels))


def _class_balanced(labels: Labels, generator: torch.Generator) -> list[Tensor]:
    """Return the rows that are drawn of each class."""
    counts = np.bincount(labels)
    in_order = torch.from_numpy(np.argsort(labels, kind="stable"))
    by_class = torch.split(in_order, counts[counts > 0].tolist())
    share, num_longer = divmod(len(labels), len(by_class))
    is_longer = torch.randperm(len(by_class), generator=generator) < num_longer
    drawn = []
    for rows, longer in zip(by_class, is_longer.tolist(), strict=True):
        number = share + longer
        passes = [
            rows[torch.randperm(len(rows), generator=generator)]
            for _ in range(-(-number // len(rows)))
        ]
        drawn.extend([torch.cat(passes)[:number]] if passes else [])
    return drawn


def _counted_on(rows: list[int], num_rows: int) -> list[int]:
    seen: Counter[int] = Counter()
    counted = []
    for row in rows:
        counted.append(row + seen[row] * num_rows)
        seen[row] += 1
    return counted
