"""Measures of a classifier against their definitions, in one batch or many."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from drtune_ray.training.validation import NUM_BINS, ValidationTotals


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(97, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(
        0, 4, (97,), generator=torch.Generator().manual_seed(1)
    )  # one class unseen


def measured(logits: torch.Tensor, labels: torch.Tensor, *sizes: int) -> dict[str, float]:
    parts = [ValidationTotals(5, torch.device("cpu")) for _ in sizes]  # as of several processes
    for total, rows, answers in zip(parts, logits.split(sizes), labels.split(sizes), strict=True):
        total.add(rows, answers)
    return parts[0].measures(torch.stack([part.sums for part in parts]).sum(0))


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. 2017, eq. 3, in loops."""
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, predicted = shares.max(1), shares.argmax(1)
    error = 0.0
    for index in range(NUM_BINS):
        low, high = index / NUM_BINS, (index + 1) / NUM_BINS
        inside = [i for i, value in enumerate(confidence) if low < value <= high]
        if inside:
            accuracy = np.mean([predicted[i] == labels[i] for i in inside])
            error += len(inside) / len(labels) * abs(accuracy - confidence[inside].mean())
    return error


@pytest.mark.parametrize("sizes", [(97,), (64, 33), (96, 1)])
def test_measures(logits, labels, sizes):
    found = measured(logits, labels, *sizes)
    predicted = logits.argmax(1)
    assert found["val_accuracy"] == pytest.approx((predicted == labels).double().mean().item())
    wanted = F.cross_entropy(logits.double(), labels).item()
    assert found["val_loss"] == pytest.approx(wanted, rel=1e-12)
    worst = min((predicted[labels == c] == c).double().mean().item() for c in range(4))
    assert found["val_worst_class_accuracy"] == pytest.approx(worst)
    error = expected_calibration_error(logits.double().numpy(), labels.numpy())
    assert found["val_calibration_error"] == pytest.approx(error, rel=1e-9)


def test_broken_weights_are_seen_by_the_loss(logits, labels):
    found = measured(torch.full_like(logits, math.nan), labels, 97)
    assert math.isnan(found["val_loss"])
