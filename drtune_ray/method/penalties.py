"""Penalties that are added to the loss of a method.

L2-SP: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks", ICML 2018, https://arxiv.org/abs/1802.01483.
BSS: Chen et al., "Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for
Safe Transfer Learning", NeurIPS 2019.
Legend: B batch rows of all processes, D features, W processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from drtune_ray.method.base import Method, Penalty
from drtune_ray.method.collective import Collective, Shard
from drtune_ray.method.precision import at_least_float32


class StartingPoint(nn.Module):
    """Values of a module's trained parameters at construction: w0, kept out of ``state_dict``.

    Args:
        module: The module; it need not be the same object later, only have the same names.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._keys = {name: f"start_{number}" for number, name in enumerate(trained)}
        for name, parameter in trained.items():
            self.register_buffer(self._keys[name], parameter.detach().clone(), persistent=False)

    def pairs(self, module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each trained parameter with its first value."""
        parameters = dict(module.named_parameters())
        return [(parameters[name], self.get_buffer(key)) for name, key in self._keys.items()]


class L2SP(Penalty):
    """L2-SP: the distance of the weights to the pretrained ones (Li et al. 2018).

    ``alpha / 2 |w - w0|^2 + beta / 2 |v|^2`` over the trained parameters w of the encoder, from
    their pretrained values w0, and over the parameters v of the head. It takes the place of weight
    decay: set that to 0 beside it.

    Differs from the authors' code: biases and the parameters of normalisation layers are among w.

    Args:
        encoder: The encoder with its pretrained weights.
        weight: alpha, not negative.
        head_weight: beta, not negative.
    """

    name = "l2_sp"

    def __init__(self, encoder: nn.Module, weight: float = 0.1, head_weight: float = 0.01) -> None:
        super().__init__()
        self.start, self.weight, self.head_weight = StartingPoint(encoder), weight, head_weight

    def forward(self, method: Method, features: Tensor, labels: Tensor, batch: Shard) -> Tensor:
        """Compute the penalty, a scalar: once a batch, with its last part."""
        if not batch.is_last:
            return features.new_zeros(())
        total = method.head.weight.new_zeros(())
        for weight, start in self.start.pairs(method.downstream_encoder):
            total = total + self.weight / 2 * (weight - start).square().sum()
        for parameter in method.head.parameters():
            total = total + self.head_weight / 2 * parameter.square().sum()
        return total


class BatchSpectralShrinkage(Penalty):
    """BSS: shrink the smallest singular values of a batch's features (Chen et al. 2019).

    ``eta sum_{i=1..k} sigma_{-i}^2`` over the k smallest singular values of the feature matrix F of
    the global batch, (B, D), of which there are min(B, D).

    Args:
        weight: eta, not negative.
        num_values: k, at least 1.
    """

    name = "bss"
    needs_whole_batch = True

    def __init__(self, weight: float = 0.001, num_values: int = 1) -> None:
        super().__init__()
        self.weight, self.num_values = weight, num_values

    def forward(self, method: Method, features: Tensor, labels: Tensor, batch: Shard) -> Tensor:
        """Compute the penalty, a scalar."""
        with torch.autocast(features.device.type, enabled=False):
            return self.weight * of_global_batch(
                self._shrunk, at_least_float32(features), batch, method.collective
            )

    def _shrunk(self, features: Tensor) -> Tensor:
        values: Tensor = torch.linalg.svdvals(features)
        return values[-self.num_values :].square().sum()


def of_global_batch(
    function: Callable[[Tensor], Tensor], rows: Tensor, batch: Shard, collective: Collective
) -> Tensor:
    """Compute a function of the rows of all processes, with the gradient for this process's rows.

    The mean over the processes of the gradients is that of one process with all rows.

    Args:
        function: Rows (B, D) to a scalar; the same in every process.
        rows: Rows of this process, with gradient.
        batch: This process's part of the global batch.
        collective: The processes.
    """
    if collective.world_size == 1:
        return function(rows)
    gathered = collective.gather_rows(rows.detach(), batch.shares).requires_grad_()
    with torch.enable_grad():
        value = function(gathered)
    (gradient,) = torch.autograd.grad(value, gathered)
    start = sum(batch.shares[: collective.rank])
    own = gradient[start : start + len(rows)] * collective.world_size
    return value.detach() + (own * (rows - rows.detach())).sum()
