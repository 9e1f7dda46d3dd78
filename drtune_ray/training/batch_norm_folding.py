"""Fold BatchNorm into the convolution before it: the same frozen encoder with fewer layers."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

logger = logging.getLogger(__name__)
RELATIVE_ERROR = 1e-4
BatchNorm = nn.modules.batchnorm._BatchNorm


def folded(encoder: nn.Module, image_size: int) -> nn.Module:
    """Return a frozen encoder in eval mode that computes the same features with fewer layers.

    Args:
        encoder: Module from images (B, 3, S, S) to features (B, D), in the precision that it is
            used in; frozen by this call, and otherwise unchanged.
        image_size: S, side of the images in pixels.

    Returns:
        A copy in which each BatchNorm that reads the output of a convolution is part of it; the
        encoder itself where folding changes the features of a probe image (another layer reads
        the same output) or there is nothing to fold.
    """
    encoder.requires_grad_(False).eval()
    fewer = copy.deepcopy(encoder)
    image = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    image = image.to(next(encoder.parameters()).dtype)
    with torch.no_grad():
        pairs = _pairs(fewer, image)
        if not pairs:
            return encoder
        for convolution, name in pairs:
            _fold(fewer, convolution, name)
        expected, found = encoder(image), fewer(image)
    # Negated, so that features that are not finite count as different.
    if not (found - expected).abs().max() <= RELATIVE_ERROR * expected.abs().max():
        logger.warning("the frozen encoder's BatchNorm layers could not be folded: it runs slower")
        return encoder
    return fewer


def _pairs(model: nn.Module, image: Tensor) -> list[tuple[nn.Conv2d, str]]:
    """Each convolution whose output a BatchNorm reads unchanged, with the name of that BatchNorm.

    Layers that are used more than once are left out, as are BatchNorms without statistics.
    """
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # keeps the tensor: its id stays unique
    found: list[tuple[nn.Conv2d, str]] = []
    calls: Counter[nn.Module] = Counter()

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        calls[module] += 1
        outputs[id(output)] = (module, output)

    def match(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] += 1
        if id(inputs[0]) in outputs:
            found.append((outputs[id(inputs[0])][0], name))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(remember))
        elif isinstance(module, BatchNorm) and module.running_var is not None:
            handles.append(module.register_forward_pre_hook(partial(match, name)))
    model(image)
    for handle in handles:
        handle.remove()
    return [
        (convolution, name)
        for convolution, name in found
        if calls[convolution] == calls[model.get_submodule(name)] == 1
    ]


def _fold(model: nn.Module, convolution: nn.Conv2d, name: str) -> None:
    parent_name, _, leaf = name.rpartition(".")
    batch_norm = model.get_submodule(name)
    assert isinstance(batch_norm, BatchNorm)
    fused = fuse_conv_bn_eval(convolution, batch_norm)
    convolution.weight, convolution.bias = fused.weight, fused.bias
    # timm's BatchNormAct2d also applies the activation that follows.
    rest = getattr(batch_norm, "act", nn.Identity())
    setattr(model.get_submodule(parent_name), leaf, rest)
