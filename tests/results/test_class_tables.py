"""The tables of a classifier, against their definitions written as loops."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from drtune_ray.method.collective import Collective
from drtune_ray.results.class_tables import ClassTables, class_tables
from drtune_ray.training.validation import ValidationTotals

NAMES = ("ant", "bee", "cat", "dog")


def drawn(
    num_images: int = 60, num_classes: int = 4, seed: int = 0
) -> tuple[list[int], torch.Tensor]:
    """Labels of all classes but the last, and logits with ties."""
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes - 1, (num_images,), generator=made)
    logits = torch.randn(num_images, num_classes, generator=made, dtype=torch.float64).mul(2)
    logits = logits.round() / 2
    logits[torch.arange(num_images), labels] += 0.75
    return labels.tolist(), logits


@pytest.fixture(scope="module")
def found() -> ClassTables:
    labels, logits = drawn()
    return class_tables(labels, logits.softmax(1).numpy(), NAMES)


def test_class_tables__counts_by_hand() -> None:
    labels = [0, 0, 0, 1, 1, 2]
    guesses = [0, 0, 1, 1, 0, 3]
    shares = np.full((6, 4), 0.1)
    shares[range(6), guesses] = 0.7
    found = class_tables(labels, shares, NAMES)
    assert found.matrix == ((2, 1, 0, 0), (1, 1, 0, 0), (0, 0, 0, 1), (0, 0, 0, 0))
    assert [(row.name, row.support) for row in found.classes] == [
        ("ant", 3), ("bee", 2), ("cat", 1), ("dog", 0),
    ]  # fmt: skip
    assert [row.precision for row in found.classes] == [2 / 3, 1 / 2, None, 0.0]
    assert [row.recall for row in found.classes] == [2 / 3, 1 / 2, 0.0, None]
    assert [row.f1 for row in found.classes] == [pytest.approx(2 / 3), 1 / 2, 0.0, None]
    assert found.accuracy == 0.5
    assert found.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found.log_loss == pytest.approx(-(3 * math.log(0.7) + 3 * math.log(0.1)) / 6)
    assert found.calibration_error == pytest.approx(0.2)
    assert [(m.row, m.true, m.predicted) for m in found.mistakes] == [
        (2, "ant", "bee"), (4, "bee", "ant"), (5, "cat", "dog"),
    ]  # fmt: skip
    assert found.mistakes[0].probability == pytest.approx(0.7)
    first = found.confusions()[0]
    assert (first.true, first.predicted, first.num_images) == ("ant", "bee", 1)
    assert first.share == pytest.approx(1 / 3)
    assert [row.name for row in found.weakest()] == ["cat", "bee", "ant"]


def test_class_tables__auroc_is_the_share_of_pairs_in_order(found: ClassTables) -> None:
    labels, logits = drawn()
    shares = logits.softmax(1).tolist()
    areas = []
    for column in range(3):  # the last class has no images
        wins = [
            1.0 if mine[column] > other[column] else 0.5 if mine[column] == other[column] else 0.0
            for mine, label in zip(shares, labels, strict=True)
            if label == column
            for other, its in zip(shares, labels, strict=True)
            if its != column
        ]
        areas.append(sum(wins) / len(wins))
    assert found.auroc == pytest.approx(sum(areas) / 3)


def test_class_tables__agree_with_the_validation_of_training(found: ClassTables) -> None:
    labels, logits = drawn()
    totals = ValidationTotals(4, len(labels), torch.device("cpu"))
    totals.add(logits, torch.tensor(labels))
    measured = totals.measures(Collective(), [len(labels)])
    assert found.accuracy == pytest.approx(measured["val_accuracy"])
    assert found.log_loss == pytest.approx(measured["val_loss"])
    assert found.calibration_error == pytest.approx(measured["val_calibration_error"])
    assert found.balanced_accuracy == pytest.approx(measured["val_balanced_accuracy"])
    assert found.macro_f1 == pytest.approx(measured["val_macro_f1"])
    assert found.auroc == pytest.approx(measured["val_auroc"])
    seen = [row.recall for row in found.classes if row.recall is not None]
    assert min(seen) == measured["val_worst_class_accuracy"]


def test_class_tables__of_two_classes_take_the_second(found: ClassTables) -> None:
    shares = [[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]]
    assert class_tables([0, 0, 1, 1], shares, NAMES[:2]).auroc == 0.75


def test_class_tables__of_one_class_alone_have_no_auroc() -> None:
    found = class_tables([1, 1], [[0.5, 0.4, 0.1], [0.2, 0.6, 0.2]], NAMES[:3])
    assert found.auroc is None
    assert (found.accuracy, found.balanced_accuracy) == (0.5, 0.5)


def test_class_tables__survive_json_without_nan(found: ClassTables) -> None:
    text = json.dumps(found.to_mapping(), allow_nan=False)
    assert ClassTables.from_mapping(json.loads(text)) == found


def test_class_tables__bins_hold_each_image_once(found: ClassTables) -> None:
    labels, logits = drawn()
    confidence = logits.softmax(1).max(1).values
    assert sum(each.num_images for each in found.bins) == found.num_images == len(labels)
    for each in found.bins:
        inside = confidence[(confidence > each.lower) & (confidence <= each.upper)]
        assert len(inside) == each.num_images
        if each.num_images:
            assert each.confidence == pytest.approx(float(inside.mean()))
