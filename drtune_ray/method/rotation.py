"""Solvers of the global rotation (GR): orthogonal Procrustes between two paired feature sets.

DR-Tune (https://arxiv.org/abs/2308.12058), eq. 7. Solution: Schoenemann, "A generalized solution
of the orthogonal Procrustes problem", Psychometrika 1966; determinant: Kabsch, 1976; subspace
iteration: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 2011,
https://arxiv.org/abs/0909.4061; inverse square root: Higham, "Functions of Matrices", 2008, ch. 6.
Legend: K rows, D features, r rank; A, B the centred pretrained and downstream rows, (K, D);
H = B^T A their cross-covariance, (D, D), with singular values s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from drtune_ray.method.precision import at_least_float32, joint_norm

Solver = Literal["randomized", "svd"]
SOLVERS = get_args(Solver)
NUM_ROUNDINGS = 8  # error of a mean, in units of the last place
START_SEED = 0
ROOT_FLOOR = 1.2e-7  # its square, added to the Gram matrix, is still above rounding in float64
SVD_PERTURBATION = 1e-10
EXPLORATION = 1e-3  # far above rounding, far below the directions with evidence
COLD_ITERATIONS, WARM_ITERATIONS = 3, 1
NEWTON_GROWTH = 1.5  # factor of a small eigenvalue's root in one Newton-Schulz step
NUM_POLISHING = 6  # further steps, whose convergence is quadratic


class Rotation(NamedTuple):
    """R = rest I + left right^T, in factors: rows are rotated at 2 K D r products.

    Attributes:
        left: Left factor, (D, r); R itself, (D, D), where the others are None.
        right: Right factor, (D, r).
        rest: Length kept by a direction without evidence, a scalar from 0 to 1.
    """

    left: Tensor
    right: Tensor | None = None
    rest: Tensor | None = None

    def apply_(self, rows: Tensor) -> Tensor:
        """Return R v for each row, (K, D); the given rows may be overwritten."""
        if self.right is None or self.rest is None:
            return rows @ self.left.T
        coordinates = rows @ self.right
        return rows.mul_(self.rest).addmm_(coordinates, self.left.T)

    def map(self, change: Callable[[Tensor], Tensor]) -> Rotation:
        """Apply a function to each tensor."""
        return Rotation(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]

    def matrix(self) -> Tensor:
        """Return R, (D, D)."""
        if self.right is None or self.rest is None:
            return self.left
        product = self.left @ self.right.T
        product.diagonal().add_(self.rest)
        return product


def check_solver(solver: str, rank: int, shrinkage: float) -> None:
    """Check that the solver is known and that rank and shrinkage are within their ranges.

    Raises:
        ValueError: If one of them is not; the message states the condition and the value.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {list(SOLVERS)}, but got solver={solver!r}")
    if rank < 1:
        raise ValueError(f"rank >= 1 must hold, but got rank={rank}")
    if not shrinkage >= 0:
        raise ValueError(f"shrinkage >= 0 must hold, but got shrinkage={shrinkage}")


def centred(rows: Tensor, row_scale: Tensor | None = None) -> Tensor:
    """Subtract the mean of the rows, in float32 at least; zero where all rows are equal.

    Args:
        rows: Shape (K, D).
        row_scale: Factor of each row, applied first, shape (K, 1).

    Returns:
        A new tensor, shape (K, D); for float32 rows no other of this size is allocated.
    """
    rows = at_least_float32(rows)
    spread = rows.clone() if row_scale is None else rows * row_scale
    if len(rows) == 0:
        return spread
    # The mean of equal rows differs from them by rounding, which is no evidence of a direction.
    rounding = NUM_ROUNDINGS * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(spread)
    spread.sub_(spread.mean(0))
    return spread.mul_(torch.linalg.vector_norm(spread) > rounding)


def random_start(num_features: int, rank: int) -> Tensor:
    """Start of the subspace iteration without a former solution, (D, min(rank, D)).

    Seeded; the columns have lengths near 1.
    """
    generator = torch.Generator().manual_seed(START_SEED)
    start = torch.randn(num_features, min(rank, num_features), generator=generator)
    return start / math.sqrt(num_features)


def warm_start(former: Rotation, seeded: Tensor) -> Tensor:
    """Start of the subspace iteration from a former solution, (D, r).

    The right factor plus a little of the seeded start: in a direction without evidence the factor
    holds only rounding, which differs between machines, and the next search must not depend on it.
    """
    assert former.right is not None
    return former.right + EXPLORATION * seeded.to(former.right.dtype)


def subspace_rotation(
    source: Tensor,
    target: Tensor,
    start: Tensor,
    *,
    shrinkage: float,
    num_iterations: int,
) -> Rotation:
    """Rotate the r leading directions, shrunk towards what the others keep.

    With the r leading singular triplets of H = U S V^T, found by subspace iteration,

        R = U F V^T + c (I - V F V^T),   F = diag(s / sqrt(s^2 + t^2)),   t = shrinkage |S|_F.

    Directions with much evidence are rotated by U V^T. Those with little, and all others, keep
    their place at length c in [0, 1], the least-squares fit of B - A V F U^T on A - A V F V^T:
    near 1 where the encoder has hardly changed, near 0 where nothing of the pretrained features
    is left in place; 1 where the rows tell nothing of these directions. Equal banks give R = I on
    their rows once the iteration has converged; after a few products it is off by a few percent
    where singular values are close. No direction is lengthened by more than the square root of
    two. The exact minimiser of eq. 7 aligns the rows that it was fitted to better, and all other
    rows worse (docs/benchmarks.md).

    Only matrix products and QR: on an accelerator nothing waits for the host.

    Args:
        source: A, the centred pretrained rows, shape (K, D); overwritten.
        target: B, the centred downstream rows, shape (K, D); overwritten.
        start: Columns whose span is near that of V_r, shape (D, r), from :func:`random_start` or
            :func:`warm_start`.
        shrinkage: Singular value, over |S|_F, that is shrunk to 1/sqrt(2). Taken as at least 1e-6
            in float32 and 1.2e-7 in float64, below which a singular value is rounding.
        num_iterations: Products with H^T H; one suffices from a former solution.

    Returns:
        R in factors of rank r.
    """
    columns = start.to(source.dtype)
    for _ in range(num_iterations):
        # QR also replaces columns that vanished, so that no direction is lost for ever.
        left = _orthonormal(target.T @ (source @ _orthonormal(columns)))
        columns = source.T @ (target @ left)
    floor = max(NUM_ROUNDINGS * torch.finfo(columns.dtype).eps, ROOT_FLOOR)
    gram = columns.double().T @ columns.double()
    right = columns @ _inverse_root(gram, max(shrinkage, floor)).to(columns.dtype)
    unit_right = columns @ _inverse_root(gram, floor).to(columns.dtype)
    total = torch.linalg.vector_norm(source)
    coordinates = source @ right
    source.addmm_(coordinates, unit_right.T, alpha=-1.0)
    target.addmm_(coordinates, left.T, alpha=-1.0)
    size = joint_norm(source)
    ratio = torch.dot(source.flatten(), target.flatten()) / size.square().clamp(min=_tiny(size))
    rounding = columns.shape[1] * floor * total
    rest = torch.where(size > rounding, ratio.clamp(0.0, 1.0), 1.0)
    return Rotation(left - rest * unit_right, right, rest)


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal basis of the columns, (D, r); completed where they are dependent."""
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis


def _inverse_root(gram: Tensor, shrinkage: float) -> Tensor:
    """(G + shrinkage^2 tr(G) I)^(-1/2) for a positive semi-definite G, (r, r) in float64.

    Computed by the coupled Newton-Schulz iteration: an eigendecomposition would make an
    accelerator wait for the host.
    """
    # Without any evidence G is zero, and its product with this root must stay zero in float32.
    trace = gram.trace().clamp(min=torch.finfo(torch.float32).tiny)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    scaled = gram / trace + shrinkage**2 * identity
    norm = torch.linalg.matrix_norm(scaled)
    root, inverse_root = scaled / norm, identity
    # The root of the smallest eigenvalue grows to 1 from what it is at least; the count follows.
    smallest = shrinkage / math.sqrt(1.0 + shrinkage**2 * math.sqrt(len(gram)))
    num_growing = math.ceil(-math.log(smallest) / math.log(NEWTON_GROWTH))
    for _ in range(num_growing + NUM_POLISHING):
        step = 1.5 * identity - 0.5 * inverse_root @ root
        root, inverse_root = root @ step, step @ inverse_root
    found: Tensor = inverse_root / (norm * trace).sqrt()
    return found


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def exact_rotation(source: Tensor, target: Tensor, *, proper: bool = False) -> Rotation:
    """The minimiser of eq. 7 nearest to the identity, by one SVD.

    Args:
        source: A, the centred pretrained rows, shape (K, D).
        target: B, the centred downstream rows, shape (K, D).
        proper: Ask for det R = +1.
    """
    basis = _joint_basis(source, target)
    if basis is None:
        return Rotation(_polar_factor(target.T @ source, proper))
    # Outside the basis both row sets are zero: the minimiser nearest to I is I there, and the
    # problem shrinks from (D, D) to (2K, 2K) without approximation.
    small = _polar_factor((target @ basis).T @ (source @ basis), proper)
    small.diagonal().sub_(1.0)
    rotation = basis @ small @ basis.T
    rotation.diagonal().add_(1.0)
    return Rotation(rotation)


def _joint_basis(source: Tensor, target: Tensor) -> Tensor | None:
    """Orthonormal basis, (D, 2K), whose span holds the rows of both; None where 2K >= D."""
    if 2 * len(source) >= source.shape[1]:
        return None
    return _orthonormal(torch.cat([source, target]).T)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values and V^T, even where the library's algorithm does not converge.

    It fails in float32 with many equal singular values, as those of a product of projections. A
    perturbation in float64, far below the rounding of float32, separates them.
    """
    try:
        left, values, right_t = torch.linalg.svd(matrix)
        return left, values, right_t
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(START_SEED)
        noise = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
        spread = SVD_PERTURBATION * torch.linalg.matrix_norm(matrix.double()) / len(matrix)
        found = torch.linalg.svd(matrix.double() + spread * noise.to(matrix.device))
        left, values, right_t = (part.to(matrix.dtype) for part in found)
        return left, values, right_t


def _polar_factor(covariance: Tensor, proper: bool) -> Tensor:
    """Orthogonal R with the largest tr(R^T H), H (D, D); nearest to I among several.

    H = U S V^T gives R = U_1 V_1^T on the directions with evidence. The remaining columns U_0 and
    V_0 are joined by the orthogonal P that brings U_0 P V_0^T nearest to I, itself a polar factor.
    """
    left, singular_values, right_t = _svd(covariance)
    tolerance = len(covariance) * torch.finfo(covariance.dtype).eps * singular_values[:1]
    num_evident = int((singular_values > tolerance).sum())
    left_free, right_free = left[:, num_evident:], right_t[num_evident:].T
    if left_free.shape[1]:
        inner_left, _, inner_right_t = _svd(left_free.T @ right_free)
        left = torch.cat([left[:, :num_evident], left_free @ inner_left], 1)
        right_t = torch.cat([right_t[:num_evident], inner_right_t @ right_free.T])
    rotation: Tensor = left @ right_t
    if proper and torch.linalg.det(rotation) < 0:
        # The last pair carries the least evidence; without any, the least likeness to I.
        rotation -= 2.0 * torch.outer(left[:, -1], right_t[-1])
    return rotation
