"""The model that a study returns: its weights and everything needed to use them."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.views import Normalization
from drtune_ray.errors import ConfigError
from drtune_ray.results.evaluation_record import WEIGHTS_NAME
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.checkpoint import read_checkpoint
from drtune_ray.training.model import classifier
from drtune_ray.training.weights_file import NORMALIZATION
from drtune_ray.values import read_yaml, to_yaml

ABOUT_NAME = "model.yaml"


@dataclass(frozen=True)
class Winner:
    """A trained classifier.

    Attributes:
        model: Module from normalised images (B, 3, S, S) to logits (B, C), in eval mode.
        classes: Class names in the order of the logits.
        normalization: Normalization of pixels that the model expects.
        trial: Configuration that it was trained with.
        about: Its origin and its measured accuracy, as plain values.
    """

    model: nn.Module
    classes: tuple[str, ...]
    normalization: Normalization
    trial: TrialConfig
    about: dict[str, Any]


def write_winner(
    folder: Path,
    best_checkpoint: Path,
    backbone_file: Path,
    classes: tuple[str, ...],
    trial: TrialConfig,
    about: dict[str, Any],
) -> None:
    """Write a model folder, replacing an earlier one completely.

    Args:
        folder: Receives ``model.safetensors`` and ``model.yaml``.
        best_checkpoint: Weights of a trial's best epoch.
        backbone_file: Pretrained encoder that the trial started from.
        classes: Class names in the order of the labels.
        trial: Configuration of the trial.
        about: Its origin and its measured accuracy, as plain values.
    """
    best = read_checkpoint(best_checkpoint)
    normalization = read_backbone(backbone_file).normalization
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in best["model"].items()}
    recorded = {NORMALIZATION: json.dumps(asdict(normalization))}
    # `save_file` would let only the owner read it, whatever the umask.
    (temporary / WEIGHTS_NAME).write_bytes(safetensors.torch.save(tensors, recorded))
    card = {
        "about": about | {"epoch": best["record"]["epoch"]},
        "classes": list(classes),
        "normalization": {
            "mean": list(normalization.mean),
            "std": list(normalization.std),
            "interpolation": normalization.interpolation,
        },
        "trial": trial.to_mapping(),
    }
    (temporary / ABOUT_NAME).write_text(to_yaml(card))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def read_about(folder: Path) -> dict[str, Any]:
    """Return the origin and the accuracy of the model in a folder; empty if there is none."""
    path = folder / ABOUT_NAME
    return dict(read_yaml(path)["about"]) if path.exists() else {}


def read_winner(folder: Path) -> Winner:
    """Load a model folder.

    Raises:
        ConfigError: If it holds no model.
    """
    if not (folder / ABOUT_NAME).exists():
        raise ConfigError(
            f"{folder} holds no model yet: repeat the study's command until a trial completes"
        )
    card = read_yaml(folder / ABOUT_NAME)
    trial = TrialConfig.from_mapping(card["trial"])
    normalization = card["normalization"]
    model = classifier(
        trial.backbone.name,
        trial.data.image_size,
        safetensors.torch.load_file(folder / WEIGHTS_NAME),
    )
    return Winner(
        model,
        tuple(card["classes"]),
        Normalization(
            tuple(normalization["mean"]),
            tuple(normalization["std"]),
            normalization["interpolation"],
        ),
        trial,
        card["about"],
    )
