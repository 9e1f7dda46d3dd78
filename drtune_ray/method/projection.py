"""Methods that project the weights towards the pretrained ones after a step of the optimiser.

SPD: Tian, Huang, Kira, "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models",
NeurIPS 2024, https://arxiv.org/abs/2411.01713.
FTP: Tian, Liu, Smith, Kira, "Fast Trainable Projection for Robust Fine-Tuning", NeurIPS 2023,
https://arxiv.org/abs/2310.19182.

Each works on every tensor of the encoder by itself, with any optimiser; the head is free. Legend: w
a tensor before the step, w~ after it, w0 the pretrained one, g its gradient at w, t the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drtune_ray.method.base import Method
from drtune_ray.method.penalties import StartingPoint

NORM_FLOOR = 1e-8  # that of the authors' code


class SPD(Method):
    """SPD: where the gradient points back, undo a part of the growth of the distance.

    With c = -g . (w - w0) and r = max(0, |w~ - w0| - |w - w0|) / |w~ - w0|, a
    tensor with c < 0 becomes ``w~ - lambda r (w~ - w0)``; others stay w~. lambda 1 projects
    onto the sphere of the distance before the step. It takes the place of weight decay: set that to
    0 beside it.

    Args:
        downstream_encoder: Images to features (B, D), with the pretrained weights; trained.
        head: Linear layer, (B, D) to (B, C).
        weight: lambda, not negative.
        options: See :class:`~drtune_ray.method.base.Method`.
    """

    def __init__(
        self,
        downstream_encoder: nn.Module,
        head: nn.Linear,
        *,
        weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(downstream_encoder, head, **options)
        self.start, self.weight = StartingPoint(downstream_encoder), weight
        self._before: list[tuple[Tensor, Tensor]] = []  # c and |w - w0| of each tensor

    @torch.no_grad()
    def before_step(self) -> None:
        """Measure c and |w - w0|."""
        self._before = []
        for weight, start in self.start.pairs(self.downstream_encoder):
            moved = weight - start
            gradient = torch.zeros_like(moved) if weight.grad is None else weight.grad
            condition = -(gradient * moved).sum()
            self._before.append((condition, torch.linalg.vector_norm(moved)))

    @torch.no_grad()
    def after_step(self, is_taken: bool) -> None:
        """Project the weights."""
        before, self._before = self._before, []
        if not is_taken:
            return
        pairs = self.start.pairs(self.downstream_encoder)
        for (weight, start), (condition, distance) in zip(pairs, before, strict=True):
            moved = weight - start
            reached = torch.linalg.vector_norm(moved)
            ratio = (reached - distance).clamp(min=0.0) / reached.clamp(min=NORM_FLOOR)
            weight.sub_(moved * (self.weight * ratio * (condition < 0)))


class FTP(Method):
    """FTP: each tensor keeps to a learnt distance gamma from its start; as in the authors' code.

    ``w = w0 + min(1, gamma / n) (w~ - w0)`` with n the L1 norm of each row of w~ - w0 (MARS norm).
    gamma starts at 1e-8 and follows Adam (rate 0.01, moments 0.9 and 0.999) by the gradient of the
    loss by gamma at the last projection, ``sum over rows of g . (w~ - w0) / n`` with the w~ and n
    of that one; it stays between 1e-8 and the largest n.

    Args:
        downstream_encoder: Images to features (B, D), with the pretrained weights; trained.
        head: Linear layer, (B, D) to (B, C).
        annealing: Factor k of a gradient that would lower gamma, from 0 to 1.
        options: See :class:`~drtune_ray.method.base.Method`.
    """

    rate, decay, square_decay = 0.01, 0.9, 0.999
    gammas: Tensor
    first_moments: Tensor
    second_moments: Tensor

    def __init__(
        self,
        downstream_encoder: nn.Module,
        head: nn.Linear,
        *,
        annealing: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(downstream_encoder, head, **options)
        self.start, self.annealing, self.num_steps = StartingPoint(downstream_encoder), annealing, 0
        pairs = self.start.pairs(downstream_encoder)
        for number, (weight, _) in enumerate(pairs):  # (w~ - w0) / n of the last step
            self.register_buffer(f"direction_{number}", torch.zeros_like(weight))
        like = head.weight.detach()
        self.register_buffer("gammas", like.new_full((len(pairs),), NORM_FLOOR))
        self.register_buffer("first_moments", like.new_zeros(len(pairs)))
        self.register_buffer("second_moments", like.new_zeros(len(pairs)))
        self._slopes: list[Tensor] = []  # the gradient of each gamma

    @torch.no_grad()
    def before_step(self) -> None:
        """Compute the gradients of the loss by the gammas."""
        self._slopes = [
            self.gammas.new_zeros(()) if weight.grad is None else (weight.grad * direction).sum()
            for weight, _, direction in self._tensors()
        ]

    @torch.no_grad()
    def after_step(self, is_taken: bool) -> None:
        """Update the gammas and project the weights."""
        slopes, self._slopes = self._slopes, []
        if not is_taken:
            return
        self.num_steps += 1
        if self.num_steps > 1 and slopes:
            self._update(torch.stack(slopes).to(self.gammas))
        for number, (weight, start, direction) in enumerate(self._tensors()):
            moved = weight - start
            norms = row_norms(moved)
            gamma = self.gammas[number].clamp(min=NORM_FLOOR).minimum(norms.max())
            if self.num_steps == 1:
                gamma = self.gammas[number]
            self.gammas[number] = gamma
            weight.copy_(start + (gamma / norms).clamp(max=1.0) * moved)
            direction.copy_(moved / norms)

    def _update(self, slopes: Tensor) -> None:
        """Take a step of Adam."""
        slopes = torch.where(slopes > 0, slopes * self.annealing, slopes)
        self.first_moments.lerp_(slopes, 1.0 - self.decay)
        self.second_moments.lerp_(slopes.square(), 1.0 - self.square_decay)
        first = self.first_moments / (1.0 - self.decay**self.num_steps)
        second = self.second_moments / (1.0 - self.square_decay**self.num_steps)
        self.gammas.sub_(self.rate * first / (second.sqrt() + NORM_FLOOR))

    def _tensors(self) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Return each trained tensor with its start and its last direction."""
        pairs = self.start.pairs(self.downstream_encoder)
        return [
            (weight, start, self.get_buffer(f"direction_{number}"))
            for number, (weight, start) in enumerate(pairs)
        ]

    def get_extra_state(self) -> int:
        """Return the number of steps, for ``state_dict``."""
        return self.num_steps

    def set_extra_state(self, state: int) -> None:
        """Restore the number of steps."""
        self.num_steps = state

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor]:
        """``distance_limit``: mean of the gammas."""
        return {"distance_limit": self.gammas.mean()} if len(self.gammas) else {}


def row_norms(tensor: Tensor) -> Tensor:
    """L1 norm of each row, all dimensions but the first, plus 1e-8; of a vector as a whole.

    Returns:
        Shape (rows, 1, ...), or (1,) of a vector: what divides the tensor.
    """
    dims = tuple(range(1, tensor.ndim)) or (0,)
    return tensor.abs().sum(dims, keepdim=True) + NORM_FLOOR
