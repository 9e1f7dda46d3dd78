"""Supervised contrastive learning beside the cross-entropy.

Gunel, Du, Conneau, Stoyanov, "Supervised Contrastive Learning for Pre-trained Language Model
Fine-tuning", ICLR 2021, https://arxiv.org/abs/2011.01403, whose loss is that of Khosla et al. 2020.
Legend: B batch rows of all processes, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from drtune_ray.method.base import Method, Penalty
from drtune_ray.method.collective import Shard
from drtune_ray.method.penalties import of_global_batch
from drtune_ray.method.precision import at_least_float32


class SupervisedContrast(Penalty):
    """lambda SCL (Gunel et al. 2021); the method's cross-entropy has 1 - lambda.

    Args:
        weight: lambda, from 0 to 1.
        temperature: tau, above 0.
    """

    name = "scl"
    needs_whole_batch = True

    def __init__(self, weight: float = 0.9, temperature: float = 0.3) -> None:
        super().__init__()
        self.weight, self.temperature = weight, temperature

    def forward(self, method: Method, features: Tensor, labels: Tensor, batch: Shard) -> Tensor:
        """Compute the term, a scalar; labels are those before mixing."""
        everyone = method.collective.gather_rows(labels, batch.shares)
        with torch.autocast(features.device.type, enabled=False):
            return self.weight * of_global_batch(
                lambda rows: supervised_contrast(rows, everyone, self.temperature),
                at_least_float32(features),
                batch,
                method.collective,
            )


def supervised_contrast(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SCL, a mean over the rows: rows of a class attract each other, others repel.

    For row i it is the mean over the other rows j of its class of
    ``-log exp(z_i . z_j / tau) / sum_{k != i} exp(z_i . z_k / tau)``, z L2-normalised features; 0
    for a row alone in its class.

    Args:
        features: Shape (B, D).
        labels: Shape (B,).
        temperature: tau.
    """
    unit = F.normalize(features, dim=1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarities = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    log_shares = similarities.log_softmax(1).masked_fill(itself, 0.0)
    partners = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~itself
    number = partners.sum(1)
    sums = torch.where(partners, log_shares, 0.0).sum(1)
    return -(sums / number.clamp(min=1)).mean()
