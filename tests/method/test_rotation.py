import re

import numpy as np
import pytest
import torch

from drtune_ray.method import global_rotation
from tests.method import reference

D = 16
# Few rows are solved in a subspace of 2K < D; then directly with a singular H; then a regular one.
ROW_COUNTS = [2, 3, 7, 8, 12, 16, 40]
LARGE_ROW_COUNTS = [40, 200]


def random_rows(num_rows, width=D, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator, dtype=torch.float64).to(dtype)


def random_pair(num_rows, width=D, seed=0):
    """Two different but related sets, away from the origin."""
    pretrained = random_rows(num_rows, width, seed) + 2.0
    mixed = pretrained @ random_orthogonal(width, seed=seed + 100).T
    return pretrained, mixed + 0.3 * random_rows(num_rows, width, seed + 200) - 1.0


def random_orthogonal(width, *, determinant=1.0, seed=0):
    matrix = torch.linalg.qr(random_rows(width, width, seed))[0]
    if torch.linalg.det(matrix) * determinant < 0:
        matrix[:, 0] *= -1
    return matrix


def identity(width=D):
    return torch.eye(width, dtype=torch.float64)


def covariance(pretrained, downstream):
    return torch.from_numpy(reference.cross_covariance(pretrained.numpy(), downstream.numpy()))


def misfit(rotation, pretrained, downstream):
    """The sum that eq. 7 minimises."""
    pretrained, downstream = pretrained - pretrained.mean(0), downstream - downstream.mean(0)
    return sum(
        float((rotation @ v_p - v_d).square().sum())
        for v_p, v_d in zip(pretrained, downstream, strict=True)
    )


def assert_close(actual, expected, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol)


@pytest.mark.parametrize("proper", [False, True])
@pytest.mark.parametrize("num_rows", ROW_COUNTS)
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_equals_the_reference(num_rows, proper, seed):
    pretrained, downstream = random_pair(num_rows, seed=seed)
    expected = reference.rotation_matrix(pretrained.numpy(), downstream.numpy(), proper)
    rotation = global_rotation(pretrained, downstream, proper=proper)
    assert_close(rotation, torch.from_numpy(expected), atol=1e-8)


@pytest.mark.parametrize("proper", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, *ROW_COUNTS])
def test_is_orthogonal(num_rows, proper):
    rotation = global_rotation(*random_pair(num_rows), proper=proper)
    assert_close(rotation.T @ rotation, identity())


@pytest.mark.parametrize("num_rows", [0, 1])
def test_one_row_or_none_gives_the_identity(num_rows):
    assert torch.equal(global_rotation(*random_pair(num_rows)), identity())


@pytest.mark.parametrize("determinant", [1.0, -1.0])
@pytest.mark.parametrize("num_rows", LARGE_ROW_COUNTS)
def test_recovers_a_known_orthogonal_matrix(num_rows, determinant):
    known = random_orthogonal(D, determinant=determinant, seed=5)
    pretrained = random_rows(num_rows)
    downstream = pretrained @ known.T + 3.0
    assert_close(global_rotation(pretrained, downstream), known, atol=1e-8)
    assert_close(global_rotation(downstream, pretrained), known.T, atol=1e-8)


@pytest.mark.parametrize("determinant", [1.0, -1.0])
@pytest.mark.parametrize("num_rows", ROW_COUNTS)
def test_proper_rotation_has_determinant_one(num_rows, determinant):
    pretrained = random_rows(num_rows)
    downstream = pretrained @ random_orthogonal(D, determinant=determinant).T
    rotation = global_rotation(pretrained, downstream, proper=True)
    assert torch.linalg.det(rotation).item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("determinant", [1.0, -1.0])
@pytest.mark.parametrize("proper", [False, True])
def test_no_matrix_of_a_grid_in_the_plane_fits_better(determinant, proper):
    pretrained = random_rows(9, 2)
    turned = pretrained @ random_orthogonal(2, determinant=determinant, seed=3).T
    downstream = turned + 0.5 * random_rows(9, 2, seed=4)
    rotation = global_rotation(pretrained, downstream, proper=proper)
    angles = np.linspace(0, 2 * np.pi, 500, endpoint=False)
    candidates = [[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in angles]
    if not proper:
        candidates += [[[np.cos(a), np.sin(a)], [np.sin(a), -np.cos(a)]] for a in angles]
    best = min(misfit(torch.tensor(c), pretrained, downstream) for c in candidates)
    assert best - 1e-2 < misfit(rotation, pretrained, downstream) <= best


@pytest.mark.parametrize("proper", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("num_rows", "width"), [(3, D), (12, D), (40, D), (2, 3), (100, 320), (200, 320)]
)
def test_equal_banks_give_the_identity(num_rows, width, dtype, proper):
    rows = random_rows(num_rows, width, dtype=dtype) + 2.0
    rotation = global_rotation(rows, rows.clone(), proper=proper)
    atol = 1e-4 if dtype == torch.float32 else 1e-10
    assert_close(rotation, torch.eye(width, dtype=dtype), atol)


@pytest.mark.parametrize("num_rows", [2, 3, 7, 8, 12, 16])
def test_few_rows_are_turned_as_by_any_minimiser(num_rows):
    """Outside the rows' span solvers may disagree; on the rows, and in the misfit, they may not."""
    pretrained, downstream = random_pair(num_rows)
    plain = torch.from_numpy(reference.plain_rotation(pretrained.numpy(), downstream.numpy()))
    rotation = global_rotation(pretrained, downstream)
    centred = pretrained - pretrained.mean(0)
    assert_close(centred @ rotation.T, centred @ plain.T, atol=1e-8)
    assert misfit(rotation, pretrained, downstream) == pytest.approx(
        misfit(plain, pretrained, downstream), rel=1e-9
    )


@pytest.mark.parametrize("num_rows", [2, 3, 7, 8])
def test_directions_orthogonal_to_all_rows_are_left_alone(num_rows):
    pretrained, downstream = random_pair(num_rows)
    rows = torch.cat([pretrained - pretrained.mean(0), downstream - downstream.mean(0)])
    _, values, right_t = torch.linalg.svd(rows)
    outside = right_t[int((values > 1e-9).sum()) :]
    assert len(outside) >= D - 2 * (num_rows - 1)
    rotation = global_rotation(pretrained, downstream)
    assert_close(outside @ rotation.T, outside)


@pytest.mark.parametrize("num_rows", [2, 3, 7, 8, 12])
def test_a_slight_pull_to_the_identity_gives_the_same(num_rows):
    """METHOD.md: the polar factor of H + eps |H| I."""
    pretrained, downstream = random_pair(num_rows)
    pulled = covariance(pretrained, downstream)
    pulled += 1e-7 * torch.linalg.matrix_norm(pulled, 2) * identity()
    left, _, right_t = torch.linalg.svd(pulled)
    assert_close(global_rotation(pretrained, downstream), left @ right_t, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [40, 100])
def test_dead_channels_are_left_alone(num_rows, dtype, value):
    dead = torch.tensor([3, 9])
    pretrained, downstream = (rows.to(dtype) for rows in random_pair(num_rows))
    pretrained[:, dead] = value
    downstream[:, dead] = value
    rotation = global_rotation(pretrained, downstream)
    eye = torch.eye(D, dtype=dtype)
    atol = 1e-4 if dtype == torch.float32 else 1e-9
    assert_close(rotation[dead], eye[dead], atol)
    assert_close(rotation[:, dead], eye[:, dead], atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_distinct", [2, 3])
def test_few_distinct_rows_many_times_over_turn_nothing_else(num_distinct, dtype):
    pretrained, downstream = random_pair(num_distinct)
    expected = reference.rotation_matrix(pretrained.numpy(), downstream.numpy())
    rotation = global_rotation(
        pretrained.to(dtype).repeat(20, 1), downstream.to(dtype).repeat(20, 1)
    )
    atol = 1e-4 if dtype == torch.float32 else 1e-9
    assert_close(rotation.double(), torch.from_numpy(expected), atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [3, 7, 100])
@pytest.mark.parametrize("which", ["pretrained", "downstream", "both"])
def test_rows_without_any_spread_are_no_evidence(which, num_rows, dtype):
    """The mean of equal rows is not exactly the row: rounding alone must not turn anything."""
    pretrained, downstream = (rows.to(dtype) for rows in random_pair(num_rows))
    if which in ("pretrained", "both"):
        pretrained = pretrained[:1].repeat(num_rows, 1)
    if which in ("downstream", "both"):
        downstream = downstream[:1].repeat(num_rows, 1)
    rotation = global_rotation(pretrained, downstream)
    assert_close(rotation, torch.eye(D, dtype=dtype), atol=1e-4)


@pytest.mark.parametrize("num_rows", [3, 12, 40])
def test_neither_the_order_of_the_rows_nor_a_common_shift_matters(num_rows):
    pretrained, downstream = random_pair(num_rows)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
    rotation = global_rotation(pretrained, downstream)
    assert_close(global_rotation(pretrained[order], downstream[order]), rotation)
    shifted = global_rotation(pretrained + torch.arange(D), downstream - 7.0)
    assert_close(shifted, rotation)


@pytest.mark.parametrize(
    ("given", "solved"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("num_rows", [3, 40])
def test_is_solved_in_float32_at_least(num_rows, given, solved):
    pretrained, downstream = (rows.to(given) for rows in random_pair(num_rows))
    rotation = global_rotation(pretrained, downstream)
    exact = global_rotation(pretrained.double(), downstream.double())
    assert rotation.dtype == solved
    assert_close(rotation.double(), exact, atol=1e-4)


@pytest.mark.parametrize("proper", [False, True])
@pytest.mark.parametrize("num_rows", [3, 40])
def test_autocast_does_not_lower_the_precision(num_rows, proper):
    pair = [rows.float() for rows in random_pair(num_rows)]
    expected = global_rotation(*pair, proper=proper)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotation = global_rotation(*pair, proper=proper)
    assert rotation.dtype == torch.float32
    assert torch.equal(rotation, expected)


@pytest.mark.parametrize("num_rows", [3, 40])
def test_takes_no_gradient_and_leaves_its_input_as_it_was(num_rows):
    pretrained, downstream = (rows.requires_grad_() for rows in random_pair(num_rows))
    copies = pretrained.detach().clone(), downstream.detach().clone()
    assert not global_rotation(pretrained, downstream).requires_grad
    assert torch.equal(pretrained, copies[0])
    assert torch.equal(downstream, copies[1])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((4, 3), (5, 3)),
            "pretrained and downstream must both be (K, D), but got (4, 3) and (5, 3)",
        ),
        (
            ((4, 3), (4, 2)),
            "pretrained and downstream must both be (K, D), but got (4, 3) and (4, 2)",
        ),
        (((4,), (4,)), "pretrained and downstream must both be (K, D), but got (4,) and (4,)"),
    ],
)
def test_shapes_that_differ_are_refused(shapes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        global_rotation(*(torch.ones(shape) for shape in shapes))


def test_an_unknown_solver_is_refused():
    message = "solver must be one of ['randomized', 'svd'], but got solver='jacobi'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        global_rotation(*random_pair(3), solver="jacobi")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decomposition_that_does_not_converge_is_tried_in_another_way(monkeypatch, dtype):
    """As LAPACK's does on some real banks in float32, with many equal singular values."""
    pretrained, downstream = (rows.to(dtype) for rows in random_pair(40))
    expected = global_rotation(pretrained, downstream)
    decompose, asked = torch.linalg.svd, []

    def fails_once(matrix, **options):
        asked.append(matrix.dtype)
        if len(asked) == 1:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return decompose(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails_once)
    rotation = global_rotation(pretrained, downstream)
    assert asked[:2] == [dtype, torch.float64]
    assert rotation.dtype == dtype
    assert_close(rotation, expected, atol=1e-4 if dtype == torch.float32 else 1e-7)
