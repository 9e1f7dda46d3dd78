"""The per-epoch numbers that tell why a trial won, against loops and known cases."""

import math
import operator

import pytest
import torch

from drtune_ray.method import CETuning, global_rotation
from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.diagnostics import (
    agreement,
    centre_distance,
    head_gradient_share,
    sparse_class_share,
    turning_angle,
)
from tests.method.reference import mean
from tests.method.tiny import KEPT, make_data, make_encoder, make_head, make_method, warmed_up

RANDOMIZED = KEPT | {"rotation_solver": "randomized", "normalize": True, "similarity": "cosine"}


def rows_of(seed, num_rows=9):
    return torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(seed)).double()


def test_centre_distance_is_the_mean_over_classes_with_rows():
    first, second = rows_of(0), rows_of(1)
    labels = torch.tensor([0, 0, 3, 3, 3, 1, 0, 3, 1])
    distances = []
    for c in (0, 1, 3):
        rows = [k for k in range(9) if labels[k] == c]
        gap = mean([first[k] for k in rows]) - mean([second[k] for k in rows])
        distances.append(math.sqrt(sum(float(x) ** 2 for x in gap)))
    found = centre_distance(first, second, ClassRows(labels, 5))
    assert found.item() == pytest.approx(sum(distances) / 3)


@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0, 170.0])
@pytest.mark.parametrize("solver", ["svd", "randomized"])
def test_angle_of_a_rotation_of_the_plane(solver, degrees):
    """The same for both solvers, and whatever lies in the directions that no row has."""
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    rows = torch.cat([rows_of(0, 40)[:, :2], torch.zeros(40, 2)], 1)
    turned = torch.cat([rows[:, :2] @ matrix.double().T, rows[:, 2:]], 1)
    rotation = global_rotation(rows, turned, solver=solver, rank=2)
    rows = rows - rows.mean(0)
    assert turning_angle(rows, rows @ rotation.T).item() == pytest.approx(degrees, abs=0.05)


def test_a_small_angle_of_many_float32_rows_is_not_lost_to_rounding():
    """Norms of 2e6 numbers at once are short by 2e-5 or more: half a degree would read as none."""
    rows = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    across = torch.stack([-rows[:, 1::2], rows[:, ::2]], 2).flatten(1)  # at right angles
    angle = math.radians(0.5)
    turned = math.cos(angle) * rows + math.sin(angle) * across
    assert turning_angle(rows, turned).item() == pytest.approx(0.5, abs=0.02)


def test_sparse_classes_are_those_with_fewer_than_two_rows():
    assert sparse_class_share(
        ClassRows(torch.tensor([0, 0, 1, 3, 3, 3]), 5)
    ).item() == pytest.approx(3 / 5)


def test_agreement_counts_equal_predictions():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    second = torch.tensor([[5.0, 4.0], [1.0, 0.0], [9.0, 0.0], [0.0, 0.1]])
    assert agreement(first, second).item() == 0.75


def head_gradient(rows, labels, weight, bias, class_weights):
    """Mean over the rows of w_y (p - onehot(y)) times the row and 1, as one list."""
    gradient = [[0.0] * 5 for _ in range(3)]
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        logits = [sum(map(operator.mul, weight[c], row)) + bias[c] for c in range(3)]
        total = sum(math.exp(logit) for logit in logits)
        for c in range(3):
            error = math.exp(logits[c]) / total - (c == label)
            for d, x in enumerate([*row, 1.0]):
                gradient[c][d] += class_weights[label] * error * x / len(rows)
    return [x for of_class in gradient for x in of_class]


@pytest.mark.parametrize("class_weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.5]])
def test_share_of_dr_in_the_gradient_of_the_head(class_weights):
    downstream, calibrated, weight = rows_of(0), rows_of(1), rows_of(2, 3)
    bias, labels = rows_of(3)[0, :3], torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 1])
    norms = [
        math.hypot(*head_gradient(rows, labels, weight.tolist(), bias.tolist(), class_weights))
        for rows in (downstream, calibrated)
    ]
    weights = torch.tensor(class_weights).double()
    found = head_gradient_share(downstream, calibrated, labels, weight, bias, 0.7, weights)
    assert found.item() == pytest.approx(0.7 * norms[1] / (norms[0] + 0.7 * norms[1]))
    assert head_gradient_share(downstream, calibrated, labels, weight, None, 0.0).item() == 0.0
    same = head_gradient_share(downstream, downstream, labels, weight, bias, 1.0)
    assert same.item() == pytest.approx(0.5)


@pytest.mark.parametrize("options", [RANDOMIZED, KEPT], ids=["randomized", "svd"])
def test_calibration_takes_away_most_of_the_drift(options):
    method = warmed_up(12, bank_size=12, options=options | {"confidence_weighting": False})
    images, labels = make_data(12, seed=9)
    with torch.no_grad():
        for parameter in method.downstream_encoder.parameters():
            parameter.mul_(-1.3)
    for start in (0, 4, 8, 0):  # the fourth step refreshes the rotation
        method(images[start : start + 4], labels[start : start + 4])
    found = {name: value.item() for name, value in method.diagnostics().items()}
    assert found["semantic_drift"] > 0.3
    assert found["semantic_drift_remaining"] < found["semantic_drift"] / 2
    assert 0.0 < found["rotation_angle"] <= 180.0
    assert found["sparse_class_share"] == pytest.approx(2 / 5)  # none of class 2, one of class 1
    assert 0.0 <= found["head_agreement"] <= 1.0


def test_equal_features_have_no_drift_and_full_agreement():
    options = RANDOMIZED | {"translation": False, "rotation": False}
    method = warmed_up(8, bank_size=8, options=options)
    found = {name: value.item() for name, value in method.diagnostics().items()}
    assert found["semantic_drift"] == 0.0
    assert "rotation_angle" not in found
    assert found["head_agreement"] >= 0.75  # the calibrated rows have the mean length instead


def test_diagnostics_change_nothing():
    one, other = (warmed_up(8, bank_size=8, options=RANDOMIZED) for _ in range(2))
    images, labels = make_data(8)
    for start in (0, 4):
        rows = slice(start, start + 4)
        one.diagnostics()
        assert torch.equal(
            one(images[rows], labels[rows]).loss, other(images[rows], labels[rows]).loss
        )
    for name, tensor in one.state_dict().items():
        same = other.state_dict()[name]
        assert torch.equal(tensor, same) if isinstance(tensor, torch.Tensor) else tensor == same


def test_without_bank_or_calibration_there_is_less_to_say():
    assert CETuning(make_encoder(0), make_head()).diagnostics() == {}
    assert make_method().diagnostics() == {"bank_rows": 0.0}
    found = warmed_up(8, bank_size=8, options=None).diagnostics()
    assert sorted(found) == [
        "bank_rows",
        "dr_gradient_share",
        "head_agreement",
        "sparse_class_share",
    ]
