"""A small real training, for tests: coloured pictures, a tiny timm backbone with weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.table_store import TableStore
from drtune_ray.study.inputs import check_inputs
from drtune_ray.study.tables import prepare
from drtune_ray.training.backbones import Backbone, read_backbone
from drtune_ray.values import nested

COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 50, 50)}
IMAGES_PER_CLASS = 16
BACKBONE = "test_efficientnet"  # BatchNorm, 256 features
NORM_FREE = "test_nfnet"
WINNER_FILES = [
    "README.md",
    "SHA256SUMS",
    "config.json",
    "model.safetensors",
    "model.yaml",
]


def write_coloured(root: Path, per_class: int = IMAGES_PER_CLASS) -> Path:
    """Three classes of noisy coloured pictures: learnable, but not at once."""
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            seed = int(hashlib.sha256(f"{name}{index}".encode()).hexdigest()[:8], 16)
            noise = np.random.default_rng(seed).normal(0, 70, (24, 24, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02d}.png")
    return root


def small_values(
    images: Path, weights_file: Callable[[str], Path], backbone: str = BACKBONE
) -> dict[str, Any]:
    """Settings of a trial that takes a second: 30 images to train, batches of 8, 8, 8 and 6."""
    return {
        "data.train": str(images),
        "data.image_size": 32,
        "data.views": 2,
        "backbone.name": backbone,
        "backbone.weights": str(weights_file(backbone)),
        "training.epochs": 3,
        "training.batch_size": 8,
        "optim.backbone_lr": 0.02,
        "method.bank_size": 19,
        "method.calibration.rotation_interval": 3,
        "method.calibration.rotation_rank": 4,
    }


def small_trial(values: dict[str, Any]) -> TrialConfig:
    """The trial of dotted settings."""
    return TrialConfig.from_mapping(nested(values))


def prepared(config: TrialConfig, storage: Path) -> tuple[TrainingData, Backbone, Tables]:
    """What `train_epochs` needs."""
    with TableStore(storage, config.data.cache_limit_gib) as store:
        tables = prepare(check_inputs(config, storage), config, store, "cpu")
    backbone = read_backbone(tables.backbone)
    data = TrainingData(tables, config.data, backbone.normalization.interpolation)
    return data, backbone, tables
