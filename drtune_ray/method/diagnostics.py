"""What happens inside a DR-Tune training, in a few numbers an epoch: why one trial beats another.

DR-Tune (https://arxiv.org/abs/2308.12058), sections 3.3 and 3.4.
Legend: K bank rows, D features, C classes, r rank of the rotation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.rotation import Rotation


def centre_distance(first: Tensor, second: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean distance of the class centres of two sets of rows, over the classes that have rows.

    Between pretrained and downstream features that is the *semantic drift* which the calibration
    is to correct (section 3.4); between calibrated and downstream features, what it leaves.

    Args:
        first: Shape (K, D).
        second: Of the same images, shape (K, D).
        labels: Shape (K,).
        num_classes: C.

    Returns:
        Scalar, in units of the rows.
    """
    classes = ClassRows(labels, num_classes)
    gaps = torch.linalg.vector_norm(classes.means(first - second), dim=1)
    mean: Tensor = gaps.sum() / (classes.counts > 0).sum().clamp(min=1)
    return mean


def rotation_angle(rotation: Rotation) -> Tensor:
    """Angle by which R turns the directions with evidence, in degrees.

    From the mean cosine between a direction and its image, weighted by the evidence: tr R / D of
    an orthogonal R, tr(U F V^T) / tr F of :func:`~drtune_ray.method.rotation.subspace_rotation`.
    0 for the identity, 90 on average for unrelated directions.
    """
    if rotation.right is None:
        cosine = rotation.left.diagonal().mean()
    else:
        evidence = torch.linalg.matrix_norm(rotation.right, "nuc")
        turned = (rotation.left * rotation.right).sum() + rotation.kept * evidence
        cosine = turned / evidence.clamp(min=torch.finfo(evidence.dtype).tiny)
    return torch.acos(cosine.clamp(-1.0, 1.0)) * (180.0 / math.pi)


def sparse_class_share(labels: Tensor, num_classes: int) -> Tensor:
    """Share of the classes with fewer than two rows, 0 to 1: their centres are single images."""
    return (ClassRows(labels, num_classes).counts < 2).double().mean()


def agreement(first_logits: Tensor, second_logits: Tensor) -> Tensor:
    """Share of the rows for which both logits, (K, C), name the same class, 0 to 1."""
    return (first_logits.argmax(1) == second_logits.argmax(1)).double().mean()
