"""A few numbers an epoch that show what happens inside a DR-Tune training.

DR-Tune (https://arxiv.org/abs/2308.12058), sections 3.3 and 3.4.
Legend: K bank rows, D features, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.precision import joint_norm


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
