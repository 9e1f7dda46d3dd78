"""Precision of what is computed from features: float32 at least, float64 stays float64."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def joint_norm(rows: Tensor) -> Tensor:
    """Norm of all rows together, (K, D) -> scalar.

    By rows, whose norms round alike: over 16 million float32 numbers at once
    `torch.linalg.vector_norm` loses 3e-4 of it.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1))
    return norm
