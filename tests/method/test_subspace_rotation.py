"""The default solver: rank-limited, shrunk, warm-started; against an exact decomposition."""

import numpy as np
import pytest
import torch

from drtune_ray.method import SemanticCalibration, global_rotation
from drtune_ray.method.rotation import (
    EXPLORATION,
    centred,
    random_start,
    subspace_rotation,
    warm_start,
)
from tests.method import reference
from tests.method.reference import PAPER
from tests.method.test_rotation import D, assert_close, identity, random_orthogonal, random_rows

ENOUGH = 400  # iterations


def decaying_pair(num_rows=60, seed=0, ratio=0.55, width=D):
    """Paired rows whose cross-covariance has well separated singular values, away from 0."""
    lengths = ratio ** torch.arange(width, dtype=torch.float64)
    pretrained = random_rows(num_rows, width, seed) * lengths
    turned = pretrained @ random_orthogonal(width, seed=seed + 9).T
    return pretrained + 3.0, turned + 1e-3 * random_rows(num_rows, width, seed + 2) - 1.0


def solve(pretrained, downstream, rank=5, shrinkage=0.1, num_iterations=ENOUGH, start=None):
    start = random_start(pretrained.shape[1], rank) if start is None else start
    return subspace_rotation(
        centred(pretrained),
        centred(downstream),
        start,
        shrinkage=shrinkage,
        num_iterations=num_iterations,
    )


def by_svd(pretrained, downstream, rank, shrinkage):
    """U F V^T + c (I - V F V^T) from the truncated SVD of the cross-covariance."""
    source, target = (rows - rows.mean(0) for rows in (pretrained, downstream))
    left, values, right_t = torch.linalg.svd(target.T @ source)
    left, values, right = left[:, :rank], values[:rank], right_t[:rank].T
    weights = values / (values.square() + shrinkage**2 * values.square().sum()).sqrt()
    turned = left @ weights.diag() @ right.T
    rest = torch.eye(len(turned), dtype=turned.dtype) - right @ weights.diag() @ right.T
    unexplained = target - source @ turned.T
    length = (source @ rest * unexplained).sum() / (source @ rest).square().sum()
    return turned + length.clamp(0.0, 1.0) * rest


@pytest.mark.parametrize("shrinkage", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equals_the_truncated_svd(rank, shrinkage):
    pair = decaying_pair()
    rotation = solve(*pair, rank=rank, shrinkage=shrinkage)
    assert_close(rotation.matrix(), by_svd(*pair, rank, shrinkage), atol=1e-7)


def test_three_iterations_suffice_from_nothing_and_one_from_a_former_solution():
    """Where the spectrum falls: to a thousandth; one cold iteration is not enough for that."""
    pair = decaying_pair()
    expected = by_svd(*pair, 4, 0.1)
    cold = solve(*pair, rank=4, num_iterations=3)
    assert_close(cold.matrix(), expected, atol=1e-3)
    later = decaying_pair()[0], pair[1] + 1e-3 * random_rows(60, seed=7)
    start = warm_start(cold, random_start(D, 4))
    warm = solve(*later, rank=4, num_iterations=1, start=start)
    assert_close(warm.matrix(), by_svd(*later, 4, 0.1), atol=1e-3)
    once = solve(*pair, rank=4, num_iterations=1)
    assert (once.matrix() - expected).abs().max() > 3e-3


@pytest.mark.parametrize("determinant", [1.0, -1.0])
def test_full_rank_without_shrinkage_gives_a_known_rotation_back(determinant):
    known = random_orthogonal(D, determinant=determinant, seed=5)
    pretrained = random_rows(200)
    rotation = global_rotation(
        pretrained, pretrained @ known.T + 3.0, solver="randomized", rank=D, shrinkage=0.0
    )
    assert_close(rotation, known, atol=1e-7)
    assert_close(rotation.T @ rotation, identity(), atol=1e-7)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("num_rows", [3, 12, 40])
@pytest.mark.parametrize("rank", [2, 5, D])
def test_equal_banks_stay_where_they_are(rank, num_rows, shrinkage):
    """By the action on the rows; elsewhere nothing is known."""
    rows = decaying_pair(num_rows)[0]
    rotation = solve(rows, rows.clone(), rank=rank, shrinkage=shrinkage)
    atol = 1e-6 if shrinkage else 1e-4  # the least singular value lies at the floor of 1.2e-7
    assert_close(rotation.apply_(centred(rows)), centred(rows), atol)
    if num_rows > D and shrinkage:
        assert_close(rotation.matrix(), identity(), atol=1e-6)


def test_directions_without_evidence_keep_their_direction():
    """Outside the span of the rows R is a multiple of the identity: nothing turns by noise."""
    pretrained, downstream = (torch.cat([r, torch.zeros(60, 4)], 1) for r in decaying_pair())
    matrix = solve(pretrained, downstream, rank=6).matrix()
    length = matrix[D, D]
    assert 0.0 <= length <= 1.0
    assert_close(matrix[D:, D:], length * torch.eye(4, dtype=torch.float64))
    assert_close(matrix[D:, :D], torch.zeros(4, D, dtype=torch.float64))
    assert_close(matrix[:D, D:], torch.zeros(D, 4, dtype=torch.float64))


def test_what_is_unrelated_is_dropped_and_what_stayed_is_kept():
    pretrained = random_rows(4000)
    unrelated = solve(pretrained, random_rows(4000, seed=3), rank=4)
    assert 0.0 <= float(unrelated.rest) < 0.05
    drifted = solve(pretrained, pretrained + 0.3 * random_rows(4000, seed=3), rank=4)
    assert 0.95 < float(drifted.rest) <= 1.0


@pytest.mark.parametrize("shrinkage", [0.0, 1e-4, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_fewer_rows_than_the_rank_the_rest_is_not_guessed_from_rounding(shrinkage, dtype):
    """19 directions with evidence, 32 asked for: nothing is left to fit the length of the rest."""
    pretrained = random_rows(20, 64, dtype=dtype)
    downstream = pretrained + 0.02 * random_rows(20, 64, seed=1, dtype=dtype)
    rotation = solve(pretrained, downstream, rank=32, shrinkage=shrinkage, num_iterations=3)
    assert 0.95 < float(rotation.rest) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("which", ["pretrained", "downstream", "both"])
def test_without_any_evidence_all_is_finite_and_nothing_turns(which, num_rows, dtype):
    pair = [rows.to(dtype)[:num_rows] for rows in decaying_pair()]
    for index, name in enumerate(("pretrained", "downstream")):
        if which in (name, "both"):
            pair[index] = torch.full_like(pair[index], 0.1)
    matrix = solve(*pair, num_iterations=3).matrix()
    assert torch.isfinite(matrix).all()
    # Nothing is known where no row differs from the others; else what stays is fitted.
    is_known = num_rows > 1 and which == "downstream"
    assert_close(matrix, (0.0 if is_known else 1.0) * torch.eye(D, dtype=dtype), atol=1e-4)


@pytest.mark.parametrize("num_rows", [3, 12, 60])
def test_apply_is_the_matrix_on_each_row(num_rows):
    pair = decaying_pair(num_rows)
    rotation = solve(*pair, rank=3, num_iterations=3)
    rows = random_rows(7, seed=4)
    expected = torch.stack([rotation.matrix() @ row for row in rows])
    assert_close(rotation.apply_(rows.clone()), expected)


def test_the_order_of_the_rows_does_not_matter():
    pretrained, downstream = decaying_pair()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    one = solve(pretrained, downstream, num_iterations=3).matrix()
    other = solve(pretrained[order], downstream[order], num_iterations=3).matrix()
    assert_close(other, one)


@pytest.mark.parametrize("num_rows", [2, 4, 60])
def test_float32_is_close_to_float64(num_rows):
    pair = decaying_pair(num_rows)
    exact = solve(*pair, num_iterations=3).matrix()
    rounded = solve(*(rows.float() for rows in pair), num_iterations=3).matrix()
    assert rounded.dtype == torch.float32
    assert_close(rounded.double(), exact, atol=2e-3)


def test_what_the_others_keep_is_exact_in_float32_for_a_large_bank():
    """A norm of 2e6 numbers at once is short by 2e-5 or more: it was, and so was its square."""
    generator = torch.Generator().manual_seed(0)
    pretrained = torch.randn(1024, 2048, generator=generator)
    downstream = pretrained + torch.randn(1024, 2048, generator=generator)
    rest, exact = (
        solve(*(rows.to(dtype) for rows in (pretrained, downstream)), num_iterations=1).rest
        for dtype in (torch.float32, torch.float64)
    )
    assert 0.9 < exact < 1.0
    assert_close(rest.double(), exact, atol=1e-5)


def test_rounding_in_directions_without_evidence_does_not_steer_the_next_start():
    """With fewer rows than the rank: what QR completes differs by rounding, R may not."""
    options = PAPER | {"rotation_solver": "randomized", "rotation_rank": 8, "translation": False}
    results = []
    for order in (range(3), (2, 0, 1)):
        calibration = SemanticCalibration(D, **options).double()
        for seed, num_rows in ((0, 3), (1, 3), (2, 40)):
            pretrained, downstream = decaying_pair(num_rows, seed=seed)
            rows = list(order) if num_rows == 3 else list(range(num_rows))
            labels = torch.zeros(num_rows, dtype=torch.long)
            prototypes = torch.zeros(1, D, dtype=torch.float64)
            calibration(pretrained[rows], downstream[rows], labels, prototypes)
        results.append(calibration.applied_rotation.matrix())
    assert_close(*results, atol=1e-9)


def test_a_direction_that_had_no_evidence_is_found_when_it_gains_some():
    """Warm starts from few rows: after a few refreshes as good as from scratch."""
    rotation = solve(*decaying_pair(2), rank=4, num_iterations=3)
    pair = decaying_pair(60, seed=5)
    for _ in range(6):
        start = warm_start(rotation, random_start(D, 4))
        rotation = solve(*pair, rank=4, num_iterations=1, start=start)
    assert_close(rotation.matrix(), by_svd(*pair, 4, 0.1), atol=1e-3)


def test_equals_the_reference_over_refreshes():
    start, rotation, right = random_start(D, 5), None, None
    for seed in range(4):
        pretrained, downstream = decaying_pair(30, seed=seed)
        begin = start if rotation is None else warm_start(rotation, start)
        rotation = solve(
            pretrained, downstream, num_iterations=1 if seed else 3, start=begin.double()
        )
        slow = start.double().numpy() if right is None else right + EXPLORATION * start.numpy()
        matrix, right = reference.subspace_rotation(
            pretrained.numpy(), downstream.numpy(), slow, 0.1, 1 if seed else 3
        )
        assert_close(rotation.matrix(), torch.from_numpy(matrix), atol=1e-8)
        assert np.isfinite(right).all()
