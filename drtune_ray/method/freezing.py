"""Methods that train the head and few parameters of the encoder, or none.

Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
ICLR 2022, https://arxiv.org/abs/2202.10054 (linear probing);
Ben Zaken, Ravfogel, Goldberg, "BitFit", ACL 2022, https://arxiv.org/abs/2106.10199.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from drtune_ray.method.base import Method


class LinearProbe(Method):
    """Linear probing: the encoder keeps its pretrained weights, the head alone is trained.

    L = CE(head(f(x))) with f frozen and in eval mode (Kumar et al. 2022). Where z^p is
    known, the encoder does not run in training: its features are the same.

    Args:
        downstream_encoder: Images to features (B, D); frozen here.
        head: Linear layer, (B, D) to (B, C); trained.
        options: See :class:`~drtune_ray.method.base.Method`.
    """

    def __init__(self, downstream_encoder: nn.Module, head: nn.Linear, **options: Any) -> None:
        super().__init__(downstream_encoder.requires_grad_(False), head, **options)

    def train(self, mode: bool = True) -> LinearProbe:
        """Set the mode as ``nn.Module.train`` does; the encoder stays in eval mode."""
        super().train(mode)
        self.downstream_encoder.eval()
        return self

    def features(self, images: Tensor, pretrained_features: Tensor | None) -> Tensor:
        """Features of images, (B, D): z^p where it is known."""
        if pretrained_features is not None and len(pretrained_features) == len(images):
            return pretrained_features.to(self.head.weight.dtype)
        return super().features(images, pretrained_features)


class BitFit(Method):
    """BitFit: biases and the affine parameters of normalisation layers are trained, and the head.

    L = CE over the biases of the encoder (Ben Zaken et al. 2022); as in its use for images,
    the scales of the normalisation layers are trained with their biases. All other parameters of
    the encoder keep their pretrained values.

    Args:
        downstream_encoder: Images to features (B, D); frozen here but for these parameters.
        head: Linear layer, (B, D) to (B, C); trained.
        options: See :class:`~drtune_ray.method.base.Method`.

    Raises:
        ValueError: If the encoder has no such parameter that may be trained.
    """

    def __init__(self, downstream_encoder: nn.Module, head: nn.Linear, **options: Any) -> None:
        kept = set(bias_and_norm_parameters(downstream_encoder))
        for name, parameter in downstream_encoder.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in kept)
        if not any(parameter.requires_grad for parameter in downstream_encoder.parameters()):
            raise ValueError(
                "bitfit needs biases or normalisation layers that are not frozen, and the encoder "
                "has none: unfreeze some, or use linear_probe"
            )
        super().__init__(downstream_encoder, head, **options)


def bias_and_norm_parameters(encoder: nn.Module) -> Iterator[str]:
    """Names of biases and of the parameters of normalisation layers.

    A normalisation layer is one whose class has ``norm`` in its name.
    """
    for prefix, module in encoder.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False):
            if is_norm or name.endswith("bias"):
                yield f"{prefix}.{name}".removeprefix(".")
