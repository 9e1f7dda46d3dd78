"""The model that a study returns: its weights and everything needed to use them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.views import Normalization
from drtune_ray.errors import ConfigError, EnvironmentProblem, first_line
from drtune_ray.results.evaluation_record import WEIGHTS_NAME, sha256_of
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.checkpoint import check_best, read_checkpoint
from drtune_ray.training.model import classifier
from drtune_ray.training.weights_file import NORMALIZATION
from drtune_ray.values import read_yaml, to_yaml

ABOUT_NAME = "model.yaml"
SEAL = "# SHA-256 of the lines above: "
CARD = {"about": dict, "classes": list, "normalization": dict, "trial": dict}  # types in the card


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
    identity: str,
) -> None:
    """Write a model folder, replacing an earlier one completely.

    Args:
        folder: Receives ``model.safetensors`` and ``model.yaml``.
        best_checkpoint: Weights of a trial's best epoch.
        backbone_file: Pretrained encoder that the trial started from.
        classes: Class names in the order of the labels.
        trial: Configuration of the trial.
        about: Its origin and its measured accuracy, as plain values.
        identity: Identity of the trial, which its weights must have.

    Raises:
        CheckpointError: If the weights are not those of the trial's best epoch.
    """
    best = read_checkpoint(best_checkpoint)
    check_best(best, best_checkpoint, identity, about["val_accuracy"])
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
    card["weights_sha256"] = sha256_of(temporary / WEIGHTS_NAME)
    (temporary / ABOUT_NAME).write_text(_sealed(to_yaml(card)))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def read_about(folder: Path) -> dict[str, Any]:
    """Return the origin and the accuracy of the model in a folder; empty if there is none."""
    path = folder / ABOUT_NAME
    return dict(_read_card(path)["about"]) if path.exists() else {}


def _sealed(text: str) -> str:
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _read_card(path: Path) -> dict[str, Any]:
    text, seal, _ = path.read_bytes().decode(errors="replace").partition(SEAL)
    if seal and path.read_bytes() != _sealed(text).encode():  # models of 0.1.0 have none
        raise _damaged(path, "the checksum is another")
    card = read_yaml(path)
    for name, kind in CARD.items():
        if not isinstance(card.get(name), kind):
            raise _damaged(path, f"wrong value of {name!r}")
    return card


def _damaged(path: Path, reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{path} is damaged ({reason}): bring it back from MLflow ({path.parent.name} of the "
        f"study's run) or from a backup; or remove the file {path.parent.parent / 'done'} and "
        "repeat the study's command, which writes the model again"
    )


def read_winner(folder: Path) -> Winner:
    """Load a model folder.

    Raises:
        ConfigError: If it holds no model.
        EnvironmentProblem: If it is damaged.
    """
    if not (folder / ABOUT_NAME).exists():
        raise ConfigError(
            f"{folder} holds no model yet: repeat the study's command until a trial completes"
        )
    card = _read_card(folder / ABOUT_NAME)
    trial, weights_file = TrialConfig.from_mapping(card["trial"]), folder / WEIGHTS_NAME
    try:
        if card.get("weights_sha256") not in (None, sha256_of(weights_file)):
            raise _damaged(weights_file, "the checksum is another")
        weights = safetensors.torch.load_file(weights_file)
        normalization = _normalization(card["normalization"])
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, first_line(error)) from None
    model = classifier(trial.backbone.name, trial.data.image_size, weights)
    return Winner(
        model,
        tuple(card["classes"]),
        normalization,
        trial,
        card["about"],
    )


def _normalization(values: dict[str, Any]) -> Normalization:
    mean, std = _three(values["mean"]), _three(values["std"])
    return Normalization(mean, std, str(values["interpolation"]))


def _three(values: Iterable[Any]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue
