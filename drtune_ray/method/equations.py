"""The equations of DR-Tune in the paper's order: 7 to 12, 5 and 13, 14.

Zhou, Chen, Huang, ICCV 2023, https://arxiv.org/abs/2308.12058, sections 3.3 and 3.4. The two banks
M^p and M^d, whose rows v^p_k and v^d_k are features of the same augmented image from the pretrained
and from the downstream encoder, are the :class:`~drtune_ray.method.feature_bank.FeatureBank`.

    R        global_rotation                       eq. 7       turns all rows
    mu^p_c   pretrained_centres                    eq. 8       mean of the rotated rows of a class
    mu^d_c   confidence_guided_average             eq. 9       weighted mean of the downstream rows
    alpha_k  confidence_guided_weights             eq. 10      softmax of phi_c . v^d_k in a class
    delta_c  class_level_translation               eq. 11      mu^d_c - mu^p_c
    v^_k     calibrated_features                   eq. 12      R v^p_k + delta_{y_k}
    DR       distribution_regularization           eq. 5, 13   the head's loss on v^
    L        objective                             eq. 14      CE + lambda DR

Functions of tensors without state; `SemanticCalibration` and `DRTune` decide when each is applied.
Legend: B batch rows, K bank rows, C classes, D features; phi the head's weight rows, (C, D).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.precision import at_least_float32
from drtune_ray.method.rotation import (
    COLD_ITERATIONS,
    centred,
    check_solver,
    exact_rotation,
    random_start,
    subspace_rotation,
)

Similarity = Literal["cosine", "dot"]
SIMILARITIES = get_args(Similarity)
Reduction = Literal["sum", "mean"]
REDUCTIONS = get_args(Reduction)
NORM_FLOOR = 1e-12  # that of torch.nn.functional.normalize


# ---- global rotation (GR)


@torch.no_grad()
def global_rotation(
    pretrained: Tensor,
    downstream: Tensor,
    *,
    solver: str = "svd",
    rank: int = 32,
    shrinkage: float = 0.02,
    proper: bool = False,
) -> Tensor:
    """R that brings the centred pretrained rows near the centred downstream rows (eq. 7).

    ``svd`` returns the exact minimiser of sum_k |R v^p_k - v^d_k|^2 over orthogonal R. Where the
    cross-covariance is singular the minimiser is not unique, and the one nearest to the identity
    (Frobenius norm) is returned: directions without evidence stay as they are. ``randomized`` is
    :func:`~drtune_ray.method.rotation.subspace_rotation` from a seeded start, whose R is not
    orthogonal.

    Differs from the authors' code: theirs takes whatever the SVD gives in directions without
    evidence.

    Args:
        pretrained: v^p, shape (K, D); need not be centred.
        downstream: v^d of the same images, shape (K, D).
        solver: ``svd``, in which singular values below min(D, 2K) * eps of the largest are
            rounding and count as zero (1.5e-4 of it in float32 at 1280), or ``randomized``.
        rank: Rank r of ``randomized``; not read by ``svd``.
        shrinkage: Shrinkage of ``randomized``; not read by ``svd``.
        proper: Ask ``svd`` for det R = +1 (a rotation, as the authors' code does) where the paper
            asks for an orthogonal matrix only.

    Returns:
        R, shape (D, D), with ``R @ v_p ~ v_d`` for centred rows; for rows ``centred @ R.T``.

    Raises:
        ValueError: If the shapes differ, the solver is unknown or a number is out of range.
    """
    if pretrained.shape != downstream.shape or pretrained.ndim != 2:
        raise ValueError(
            "pretrained and downstream must both be (K, D), but got "
            f"{tuple(pretrained.shape)} and {tuple(downstream.shape)}"
        )
    check_solver(solver, rank, shrinkage)
    # Mixed precision would round the covariance to bfloat16 and rotate by the rounding.
    with torch.autocast(pretrained.device.type, enabled=False):
        source, target = centred(pretrained), centred(downstream)
        if solver == "svd":
            return exact_rotation(source, target, proper=proper).matrix()
        start = random_start(pretrained.shape[1], rank).to(source)
        return subspace_rotation(
            source, target, start, shrinkage=shrinkage, num_iterations=COLD_ITERATIONS
        ).matrix()


# ---- class-level translation (CLT) by confidence-guided averages (CGA)


def pretrained_centres(rotated: Tensor, classes: ClassRows) -> Tensor:
    """mu^p_c, the mean of the rotated pretrained rows of each class (eq. 8).

    Args:
        rotated: R v^p, shape (K, D).
        classes: Class of each row.

    Returns:
        Shape (C, D); zero for a class without rows.
    """
    return classes.means(rotated)


def confidence_guided_average(downstream: Tensor, classes: ClassRows, weights: Tensor) -> Tensor:
    """mu^d_c, the weighted mean of the downstream rows of each class (eq. 9).

    Args:
        downstream: v^d, shape (K, D).
        classes: Class of each row.
        weights: alpha, shape (K,), summing to 1 over each class.

    Returns:
        Shape (C, D); zero for a class without rows.
    """
    return classes.sums(downstream, weights)


def confidence_guided_weights(
    downstream: Tensor,
    classes: ClassRows,
    prototypes: Tensor,
    *,
    temperature: float = 1.0,
    similarity: Similarity = "dot",
    row_scale: Tensor | None = None,
) -> Tensor:
    """alpha_k, the weight of each downstream row in the centre of its class (eq. 10).

    Softmax over the rows of the class of ``similarity(phi_c, v^d_k) / temperature``.

    Differs from the authors' code: they take the cosine at temperature 1, which makes the weights
    nearly uniform; ``similarity="cosine"`` reproduces that.

    Args:
        downstream: v^d, shape (K, D).
        classes: Class of each row.
        prototypes: phi, shape (C, D).
        temperature: Divisor of the similarity; above 0.
        similarity: ``dot`` (eq. 10) or ``cosine``.
        row_scale: Factor of each row, applied first, shape (K, 1).

    Returns:
        Weights, shape (K,), summing to 1 over the rows of each class that has rows.
    """
    if similarity == "cosine":
        prototypes = F.normalize(prototypes, dim=1)
        row_scale = inverse_norms(downstream) if row_scale is None else row_scale
    scores = classes.dot(downstream, prototypes)
    if row_scale is not None:
        scores = scores * row_scale.squeeze(1)
    return classes.softmax(scores, temperature)


def class_level_translation(
    rotated: Tensor, downstream: Tensor, classes: ClassRows, weights: Tensor
) -> Tensor:
    """delta_c = mu^d_c - mu^p_c for each class (eq. 11).

    Args:
        rotated: R v^p, shape (K, D).
        downstream: v^d, shape (K, D).
        classes: Class of each row.
        weights: alpha, shape (K,); plain means without CGA.

    Returns:
        Shape (C, D); zero for a class without rows.
    """
    centres = confidence_guided_average(downstream, classes, weights)
    return centres - pretrained_centres(rotated, classes)


def calibrated_features(rotated: Tensor, translation: Tensor, classes: ClassRows) -> Tensor:
    """v^_k = R v^p_k + delta_{y_k} (eq. 12).

    Args:
        rotated: R v^p, shape (K, D); overwritten.
        translation: delta, shape (C, D).
        classes: Class of each row.

    Returns:
        Shape (K, D).
    """
    classes.add_(rotated, translation)
    return rotated


def inverse_norms(rows: Tensor) -> Tensor:
    """1 / length of each row, (K, D) -> (K, 1); finite for a zero row, which stays zero."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms.clamp(min=NORM_FLOOR).reciprocal()


# ---- distribution regularization (DR) and the objective


def distribution_regularization(
    calibrated: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    bias: Tensor | None = None,
    num_rows: float | None = None,
    *,
    class_weights: Tensor | None = None,
) -> Tensor:
    """DR, the mean cross-entropy of the head on the calibrated bank (eq. 5, 13).

    Args:
        calibrated: v^, shape (K, D), without gradient.
        labels: y, shape (K,).
        prototypes: phi, shape (C, D).
        bias: Bias of the head, shape (C,).
        num_rows: See :func:`cross_entropy`.
        class_weights: See :func:`cross_entropy`.

    Returns:
        Scalar with a gradient for the head alone.
    """
    logits = F.linear(calibrated, prototypes, bias)
    return cross_entropy(logits, labels, num_rows, class_weights=class_weights)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    num_rows: float | None = None,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """CE, the mean cross-entropy of the rows, in float32 at least.

    With targets t, weights w and smoothing eps it is the mean over the rows of
    ``-sum_c w_c ((1 - eps) t_c + eps / C) log p_c``. The divisor is the number of rows, not the sum
    of their weights, so that several processes can each take their own rows.

    Args:
        logits: Shape (B, C).
        targets: Labels, shape (B,), or probabilities of the classes, shape (B, C).
        num_rows: Divisor of the sum over the rows; B by default.
        class_weights: w, shape (C,); 1 by default.
        label_smoothing: eps, in [0, 1]. [Szegedy et al. 2016, sec. 7]
    """
    logits = at_least_float32(logits)
    total = F.cross_entropy(
        logits,
        targets.to(logits) if targets.is_floating_point() else targets,
        None if class_weights is None else class_weights.to(logits),
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / (len(targets) if num_rows is None else num_rows)


def objective(
    cross_entropy: Tensor, regularization: Tensor, weight: float, reduction: Reduction = "sum"
) -> Tensor:
    """L = CE + lambda DR (eq. 14, `sum`), or the mean of both in the authors' code (`mean`).

    Differs from the authors' code: it takes one mean over the B + K rows,
    ``(CE + weight * DR) / (1 + weight)`` at ``weight = K/B``, so that the weight also scales the
    step of the backbone; ``reduction="mean"`` reproduces that.

    Args:
        cross_entropy: CE of the batch, a scalar.
        regularization: DR, a scalar.
        weight: lambda, not negative.
        reduction: ``sum`` or ``mean``.
    """
    total = cross_entropy + weight * regularization
    return total / (1.0 + weight) if reduction == "mean" else total
