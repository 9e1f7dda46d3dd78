"""Parameter groups and optimisers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from drtune_ray.config.optimizers import WITH_MOMENTUM
from drtune_ray.config.training import OptimConfig
from drtune_ray.errors import ConfigError
from drtune_ray.training.layers import learning_rate_scales

BACKBONE, HEAD = "backbone", "head"
Group = dict[str, Any]


def build_optimizer(
    encoder: nn.Module, head: nn.Module, config: OptimConfig, head_lr_multiplier: float
) -> Optimizer:
    """Build the optimiser; the head's learning rate is a multiple of the backbone's.

    With `layer_decay` each layer of the backbone has a rate of its own; see
    :func:`~drtune_ray.training.layers.learning_rate_scales`. Biases, the affine parameters of
    normalisation layers and those that the encoder's `no_weight_decay` names (position embeddings,
    class tokens, tables of relative positions) have no weight decay, as in timm; with SGD all
    parameters have it, as in the paper's recipe (section 4.2).

    Raises:
        ConfigError: If the installed timm lacks the optimiser.
    """
    scales = learning_rate_scales(encoder, config.layer_decay)
    groups = [
        *_groups(BACKBONE, encoder, config, config.backbone_lr, scales),
        *_groups(HEAD, head, config, config.backbone_lr * head_lr_multiplier),
    ]
    # Fused: one pass over each parameter; two to three times as fast on a CPU (docs/benchmarks.md).
    if config.name == "adamw":
        return AdamW(groups, fused=True)
    if config.name == "sgd":
        return SGD(groups, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    return _of_timm(groups, config)


def _groups(
    name: str,
    module: nn.Module,
    config: OptimConfig,
    rate: float,
    scales: dict[str, float] | None = None,
) -> list[Group]:
    """Return the groups of a module: of each learning rate, those with and without decay."""
    undecayed = set() if config.name == "sgd" else _undecayed(module)
    by_scale: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            scale = scales[key] if scales else 1.0
            decayed_or_not = by_scale.setdefault(scale, ([], []))
            decayed_or_not[key in undecayed].append(parameter)
    groups = []
    # A module that is frozen has a group all the same, which tells its rate.
    for scale, (decayed, spared) in (by_scale or {1.0: ([], [])}).items():
        common = {"lr": rate * scale, "name": name}
        groups.append({"params": decayed, **common, "weight_decay": config.weight_decay})
        if spared:
            groups.append({"params": spared, **common, "weight_decay": 0.0})
    return groups


def _of_timm(groups: list[Group], config: OptimConfig) -> Optimizer:
    options: dict[str, Any] = {"momentum": config.momentum} if config.name in WITH_MOMENTUM else {}
    try:
        return create_optimizer_v2(
            groups,
            opt=config.name,
            lr=config.backbone_lr,
            weight_decay=config.weight_decay,
            **options,
        )
    except ValueError as error:
        raise ConfigError(
            f"the installed timm cannot build optim.name={config.name} ({error}): install timm "
            "1.0.20 or later, or choose sgd or adamw"
        ) from None


def _undecayed(module: nn.Module) -> set[str]:
    """Names of the parameters that have no weight decay."""
    # A method of most of timm's transformers; its names may be patterns ("pos_embed.*").
    named_by_model: Callable[[], Iterable[str]] = getattr(module, "no_weight_decay", tuple)
    patterns = tuple(named_by_model())
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim <= 1 or any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the present learning rates of head and backbone, the highest of its layers."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name, rate = str(group["name"]), float(group["lr"])
        rates[name] = max(rate, rates.get(name, rate))
    return rates
