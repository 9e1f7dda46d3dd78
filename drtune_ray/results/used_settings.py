"""The settings that a trial reads, and the values that named ones stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drtune_ray.config.method import reads_setting
from drtune_ray.config.optimizers import OPTIMIZERS, WITH_MOMENTUM
from drtune_ray.config.trial import TrialConfig
from drtune_ray.training.methods import method_scale
from drtune_ray.values import flattened

CALIBRATION = "method.calibration."
ROTATION = "method.calibration.rotation"
WEIGHTS = (f"{CALIBRATION}confidence_temperature", f"{CALIBRATION}similarity")
MOMENTUM = ("optim.momentum",)
FROZEN_ENCODER = (
    "backbone.frozen_layers",
    "backbone.frozen_patterns",
    "backbone.drop_path",
    "backbone.dropout",
    "optim.layer_decay",
    "training.batch_norm",
)
# Condition (path, value) under which a trial ignores the paths; config/trial.py says why.
IGNORED: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    (
        ROTATION,
        False,
        (
            *(
                f"{ROTATION}_{name}"
                for name in (
                    "interval",
                    "solver",
                    "rank",
                    "shrinkage",
                    "kept",
                    "restarts_each_epoch",
                )
            ),
            f"{CALIBRATION}proper_rotation",
            f"{CALIBRATION}recenter",
        ),
    ),
    (f"{ROTATION}_solver", "svd", (f"{ROTATION}_rank", f"{ROTATION}_shrinkage")),
    (f"{ROTATION}_solver", "randomized", (f"{CALIBRATION}proper_rotation",)),
    (f"{CALIBRATION}translation", True, (f"{CALIBRATION}recenter",)),
    (f"{CALIBRATION}translation", False, (f"{CALIBRATION}confidence_weighting", *WEIGHTS)),
    (f"{CALIBRATION}confidence_weighting", False, WEIGHTS),
    *(
        ("optim.name", name, ("optim.nesterov", *(() if name in WITH_MOMENTUM else MOMENTUM)))
        for name in OPTIMIZERS
        if name != "sgd"
    ),
    *(
        ("optim.schedule", name, ("optim.step_epochs", "optim.step_gamma"))
        for name in ("cosine", "cosine_per_epoch", "linear", "constant")
    ),
    ("method.name", "linear_probe", FROZEN_ENCODER),
    ("backbone.frozen_layers", "all", ("backbone.frozen_patterns", "optim.layer_decay")),
    ("data.augmentation", "none", ("data.augmentation_magnitude",)),
    ("data.augmentation", "trivial_augment", ("data.augmentation_magnitude",)),
    ("data.sampling", "class_balanced", ("training.class_weights",)),
)


def unused_settings(config: TrialConfig) -> list[str]:
    """Return the paths of the settings that a trial ignores, and of those without a value."""
    values = flattened(config.to_mapping())
    unused = {path for path, value in values.items() if value is None}
    unused |= {path for path in values if not reads_setting(config.method.name, path)}
    for path, value, ignored in IGNORED:
        if values[path] == value:
            unused.update(ignored)
    return sorted(unused)


def resolved_settings(config: TrialConfig) -> dict[str, float]:
    """Return the numbers that ``bank_over_batch`` and ``one_plus_bank_over_batch`` stand for."""
    scale = method_scale(config, config.method.bank_size)
    named: Mapping[str, tuple[Any, float]] = {
        "method.regularization_weight": (
            config.method.regularization_weight,
            scale.regularization_weight,
        ),
        "method.head_lr_multiplier": (config.method.head_lr_multiplier, scale.head_lr_multiplier),
    }
    return {path: number for path, (value, number) in named.items() if isinstance(value, str)}
