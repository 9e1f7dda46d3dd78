"""A few numbers an epoch that show what happens inside a DR-Tune training.

DR-Tune (https://arxiv.org/abs/2308.12058), sections 3.3 and 3.4.
Legend: K bank rows, D features, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.equations import distribution_regularization
from drtune_ray.method.precision import joint_norm

DR_GRADIENT_SHARE = "dr_gradient_share"


def centre_distance(first: Tensor, second: Tensor, classes: ClassRows) -> Tensor:
    """Mean distance of the class centres of two sets of rows, over the classes that have rows.

    Between pretrained and downstream features it is the *semantic drift* that the calibration
    corrects (section 3.4); between calibrated and downstream features, what remains of it.

    Args:
        first: Features, shape (K, D).
        second: Features of the same images, shape (K, D).
        classes: Class of each row.

    Returns:
        Scalar, in units of the rows.
    """
    gaps = torch.linalg.vector_norm(classes.means(first - second), dim=1)
    mean: Tensor = gaps.sum() / (classes.counts > 0).sum().clamp(min=1)
    return mean


def turning_angle(rows: Tensor, turned: Tensor) -> Tensor:
    """Angle between rows and the same rows rotated, in degrees, 0 to 180.

    Angle of the two matrices as vectors, so that long rows count for more.

    Args:
        rows: Centred rows, shape (K, D).
        turned: R times each row, shape (K, D).
    """
    lengths = joint_norm(rows) * joint_norm(turned)
    cosine = (rows * turned).sum() / lengths.clamp(min=torch.finfo(rows.dtype).tiny)
    return torch.acos(cosine.clamp(-1.0, 1.0)) * (180.0 / math.pi)


def sparse_class_share(classes: ClassRows) -> Tensor:
    """Share of the classes with fewer than two rows, 0 to 1: their centres are single images."""
    return (classes.counts < 2).double().mean()


def agreement(first_logits: Tensor, second_logits: Tensor) -> Tensor:
    """Share of the rows for which both logits, (K, C), are largest at the same class, 0 to 1."""
    return (first_logits.argmax(1) == second_logits.argmax(1)).double().mean()


@torch.enable_grad()
def head_gradient_share(
    downstream: Tensor,
    calibrated: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    regularization_weight: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Share of DR in the gradient of the head, lambda |g_DR| / (|g_CE| + lambda |g_DR|), 0 to 1.

    Both gradients are means over the bank's rows: g_CE of the cross-entropy of the downstream
    features, g_DR of the calibrated ones (eq. 5, 13). The norms are those of weight and bias
    together.

    Args:
        downstream: z^d, shape (K, D).
        calibrated: v^ of the same images, shape (K, D).
        labels: y, shape (K,).
        weight: phi, shape (C, D).
        bias: Bias of the head, shape (C,).
        regularization_weight: lambda of eq. 14.
        class_weights: Weights of the classes in both losses, shape (C,); 1 by default.
    """
    weight = weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    head = [weight] if bias is None else [weight, bias]

    def norm(rows: Tensor) -> Tensor:
        loss = distribution_regularization(rows, labels, weight, bias, class_weights=class_weights)
        return joint_norm(torch.column_stack(torch.autograd.grad(loss, head)))

    own, other = norm(downstream), regularization_weight * norm(calibrated)
    return (other / (own + other).clamp(min=torch.finfo(own.dtype).tiny)).detach()
