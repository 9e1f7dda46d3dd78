"""Global rotation (GR): the orthogonal Procrustes problem between two paired feature sets.

DR-Tune (https://arxiv.org/abs/2308.12058), eq. 7. Solution: Schoenemann, "A generalized solution
of the orthogonal Procrustes problem", Psychometrika 1966; determinant: Kabsch, 1976.
Legend: K rows, D features; A, B the centred pretrained and downstream rows, (K, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

SOLVERS = ("svd",)
NUM_ROUNDINGS = 8  # a mean's error, in units of the last place


@torch.no_grad()
def global_rotation(
    pretrained: Tensor, downstream: Tensor, *, solver: str = "svd", proper: bool = False
) -> Tensor:
    """Orthogonal R that minimises sum_k |R v^p_k - v^d_k|^2 over the centred rows (eq. 7).

    Where the cross-covariance of the rows is singular the minimiser is not unique. The one
    nearest to the identity (Frobenius norm) is returned, so directions for which the rows hold no
    evidence are left as they are; in particular everything outside the span of the rows is.

    Differs from the authors' code: theirs takes whatever the SVD gives in those directions.

    Args:
        pretrained: v^p, shape (K, D). Need not be centred.
        downstream: v^d of the same images, shape (K, D).
        solver: ``svd``, the exact solution; singular values below D * eps of the largest are
            rounding and count as zero (1.5e-4 of it in float32 at D = 1280).
        proper: Ask for det R = +1 (a rotation, as the authors' code does) where the paper asks
            for an orthogonal matrix only.

    Returns:
        R, shape (D, D), with ``R @ v_p ~ v_d`` for centred rows; for rows ``centred @ R.T``.

    Raises:
        ValueError: If the shapes differ or the solver is unknown.
    """
    if pretrained.shape != downstream.shape or pretrained.ndim != 2:
        raise ValueError(
            "pretrained and downstream must both be (K, D), but got "
            f"{tuple(pretrained.shape)} and {tuple(downstream.shape)}"
        )
    check_solver(solver)
    # Mixed precision would round the covariance to bfloat16 and rotate by the rounding.
    with torch.autocast(pretrained.device.type, enabled=False):
        return _rotation(centred(pretrained), centred(downstream), proper)


def check_solver(solver: str) -> None:
    """Refuse an unknown solver.

    Raises:
        ValueError: Naming the known ones.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {list(SOLVERS)}, but got solver={solver!r}")


def centred(rows: Tensor) -> Tensor:
    """Rows minus their mean, (K, D), in float32 at least; zero where all rows are equal."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if len(rows) == 0:
        return rows
    spread = rows - rows.mean(0)
    # The mean of equal rows differs from them by rounding, which is no evidence of a direction.
    rounding = NUM_ROUNDINGS * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows)
    return torch.where(torch.linalg.vector_norm(spread) > rounding, spread, 0.0)


def _rotation(source: Tensor, target: Tensor, proper: bool) -> Tensor:
    """R, (D, D), of centred rows, (K, D)."""
    basis = _joint_basis(source, target)
    if basis is None:
        return _polar_factor(target.T @ source, proper)
    # Outside the basis both row sets are zero: the minimiser nearest to I is I there, and the
    # problem shrinks from (D, D) to (2K, 2K) without approximation.
    small = _polar_factor((target @ basis).T @ (source @ basis), proper)
    small.diagonal().sub_(1.0)
    rotation = basis @ small @ basis.T
    rotation.diagonal().add_(1.0)
    return rotation


def _joint_basis(source: Tensor, target: Tensor) -> Tensor | None:
    """Orthonormal basis, (D, 2K), whose span holds the rows of both; None where 2K >= D."""
    if 2 * len(source) >= source.shape[1]:
        return None
    basis: Tensor = torch.linalg.qr(torch.cat([source, target]).T)[0]
    return basis


def _polar_factor(covariance: Tensor, proper: bool) -> Tensor:
    """Orthogonal R with the largest tr(R^T H), H (D, D); nearest to I among several.

    H = U S V^T gives R = U_1 V_1^T on the directions with evidence. The remaining columns U_0 and
    V_0 are joined by the orthogonal P that brings U_0 P V_0^T nearest to I, itself a polar factor.
    """
    left, singular_values, right_t = torch.linalg.svd(covariance)
    tolerance = len(covariance) * torch.finfo(covariance.dtype).eps * singular_values[:1]
    num_evident = int((singular_values > tolerance).sum())
    left_free, right_free = left[:, num_evident:], right_t[num_evident:].T
    if left_free.shape[1]:
        inner_left, _, inner_right_t = torch.linalg.svd(left_free.T @ right_free)
        left = torch.cat([left[:, :num_evident], left_free @ inner_left], 1)
        right_t = torch.cat([right_t[:num_evident], inner_right_t @ right_free.T])
    rotation: Tensor = left @ right_t
    if proper and torch.linalg.det(rotation) < 0:
        # The last pair carries the least evidence; without any, the least likeness to I.
        rotation -= 2.0 * torch.outer(left[:, -1], right_t[-1])
    return rotation
