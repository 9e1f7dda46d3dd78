"""Measures of a classifier against their definitions, in one batch or many."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch.nn import functional as F

from drtune_ray.config.metric import NUM_BINS
from drtune_ray.method.collective import Collective
from drtune_ray.training import validation
from drtune_ray.training.validation import ValidationTotals


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(97, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(
        0, 4, (97,), generator=torch.Generator().manual_seed(1)
    )  # one class unseen


def measured(
    logits: torch.Tensor, labels: torch.Tensor, *sizes: int, metric: str = "val_accuracy"
) -> dict[str, float]:
    totals = ValidationTotals(logits.shape[1], len(labels), torch.device("cpu"), metric)
    for rows, answers in zip(logits.split(sizes), labels.split(sizes), strict=True):
        totals.add(rows, answers)
    return totals.measures(Collective(), [len(labels)])


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
    seen = list(range(4))
    recalls = [(predicted[labels == c] == c).double().mean().item() for c in seen]
    assert found["val_balanced_accuracy"] == pytest.approx(sum(recalls) / 4)
    macro = f1_score(labels, predicted, labels=seen, average="macro")
    assert found["val_macro_f1"] == pytest.approx(macro)
    scores = logits.double().softmax(1)
    areas = [roc_auc_score(labels == c, scores[:, c]) for c in seen]
    assert found["val_auroc"] == pytest.approx(sum(areas) / 4)


def test_auroc__counts_a_tie_half_and_takes_the_second_of_two_classes() -> None:
    scores = torch.tensor([0.0, 1.0, 1.0, 2.0, 1.0])
    labels = torch.tensor([0, 0, 1, 1, 0])
    logits = torch.stack([torch.zeros(5), scores], 1)
    assert measured(logits, labels, 2, 3)["val_auroc"] == (1 + 0.5 + 0.5 + 1 + 1 + 1) / 6
    assert "val_auroc" not in measured(logits, torch.zeros(5, dtype=torch.long), 5)


def test_auroc__keeps_apart_what_rounds_to_a_probability_of_1() -> None:
    logits = torch.tensor([[0.0, 30.0], [0.0, 31.0]], dtype=torch.float64)
    assert measured(logits, torch.tensor([0, 1]), 2)["val_auroc"] == 1.0


def test_auroc__of_many_scores_is_measured_where_it_chooses(logits, labels, monkeypatch) -> None:
    with_it = measured(logits, labels, 97)
    without = {k: v for k, v in with_it.items() if k != "val_auroc"}
    monkeypatch.setattr(validation, "CHEAP_SCORES", 97 * 5 - 1)
    assert measured(logits, labels, 97) == without
    assert measured(logits, labels, 97, metric="auroc") == with_it
    monkeypatch.setattr(validation, "MAX_SCORES", 97 * 5 - 1)
    assert measured(logits, labels, 97, metric="auroc") == without


def test_broken_weights_are_seen_by_the_loss(logits, labels):
    found = measured(torch.full_like(logits, math.nan), labels, 97)
    assert math.isnan(found["val_loss"])
