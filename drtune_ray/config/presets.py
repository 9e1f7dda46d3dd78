"""Presets: settings of a trial by name; docs/presets.md says where each comes from."""

from __future__ import annotations

from typing import Any, Literal

PresetName = Literal["default", "paper", "authors"]
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Eq. 5-14 as printed: raw features, dot-product confidence, R fresh at every step.
    "paper": {
        "method": {
            "regularization_weight": "bank_over_batch",
            "reduction": "sum",
            "bank_size": 2048,
            "head_lr_multiplier": "one_plus_bank_over_batch",
            "calibration": {
                "rotation_solver": "svd",
                "rotation_interval": 1,
                "normalize": False,
                "similarity": "dot",
                "confidence_temperature": 1.0,
            },
        },
        "training": {"batch_norm": "local"},
    },
    # The authors' published code, commit ef9a7b1, without its faults.
    "authors": {
        "method": {
            "regularization_weight": "bank_over_batch",
            "reduction": "mean",
            "bank_size": 2048,
            "head_lr_multiplier": "one_plus_bank_over_batch",
            "calibration": {
                "rotation_solver": "svd",
                "rotation_interval": 10,
                "rotation_kept": False,
                "rotation_restarts_each_epoch": True,
                "proper_rotation": True,
                "recenter": False,
                "normalize": True,
                "similarity": "cosine",
                "confidence_temperature": 1.0,
            },
        },
        "data": {
            "crop_scale_min": 0.4,
            "horizontal_flip": 0.5,
            "crop_fraction": 0.875,
            "evaluation_resize": "square",
        },
        "optim": {"nesterov": True, "schedule": "cosine_per_epoch"},
        "training": {"batch_norm": "local", "drop_last": True},
    },
}
