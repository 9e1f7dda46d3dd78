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

from drtune_ray.config.metric import METRICS
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.pixels import DEFAULT_WHITES, WhiteValues
from drtune_ray.data.views import Normalization
from drtune_ray.errors import ConfigError, DrtuneError, EnvironmentProblem, first_line
from drtune_ray.folders import flush
from drtune_ray.results.evaluation_record import WEIGHTS_NAME, sha256_of
from drtune_ray.results.package import (
    SUMS_NAME,
    from_timm,
    timm_layout,
    write_for_timm,
    write_model_card,
    write_sums,
)
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.checkpoint import ANSWERS, check_best, read_checkpoint
from drtune_ray.training.model import classifier
from drtune_ray.training.weights_file import NORMALIZATION
from drtune_ray.values import read_yaml, to_yaml

ABOUT_NAME, HEAD_WEIGHT = "model.yaml", "head.weight"
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
        whites: Values that become white in images of more than 8 bits a channel.
    """

    model: nn.Module
    classes: tuple[str, ...]
    normalization: Normalization
    trial: TrialConfig
    about: dict[str, Any]
    whites: WhiteValues = DEFAULT_WHITES


def _plain(normalization: Normalization) -> dict[str, Any]:
    return {
        "mean": list(normalization.mean),
        "std": list(normalization.std),
        "interpolation": normalization.interpolation,
    }


def write_winner(
    folder: Path,
    best_checkpoint: Path,
    backbone_file: Path,
    classes: tuple[str, ...],
    trial: TrialConfig,
    about: dict[str, Any],
    identity: str,
    whites: WhiteValues,
) -> None:
    """Write a model folder, replacing an earlier one completely.

    Args:
        folder: Receives ``model.safetensors``, ``model.yaml`` and the files of `package`.
        best_checkpoint: Weights of a trial's best epoch.
        backbone_file: Pretrained encoder that the trial started from.
        classes: Class names in the order of the labels.
        trial: Configuration of the trial.
        about: Its origin and the value of the trial's metric under that metric's name, None if
            it was trained on the validation images too; as plain values.
        identity: Identity of the trial, which its weights must have.
        whites: Values that become white in images of more than 8 bits a channel.

    Raises:
        CheckpointError: If the weights are not those of the trial's best epoch.
    """
    best = read_checkpoint(best_checkpoint)
    metric = METRICS[trial.training.metric]
    value = about[metric.measure]
    check_best(best, best_checkpoint, identity, metric, value)
    measured = best["record"]["metrics"]
    about = about | {"val_accuracy": None if value is None else measured["val_accuracy"]}
    normalization = read_backbone(backbone_file).normalization
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    layout = timm_layout(trial.backbone.name, trial.data.image_size, best["model"])
    if layout is None:
        tensors = {name: tensor.contiguous() for name, tensor in best["model"].items()}
    else:
        tensors = layout.tensors
        write_for_timm(temporary, layout, classes, normalization, trial)
    recorded = {NORMALIZATION: json.dumps(asdict(normalization))}
    # `save_file`, timm's way too, would let only the owner read it, whatever the umask.
    (temporary / WEIGHTS_NAME).unlink(missing_ok=True)
    (temporary / WEIGHTS_NAME).write_bytes(safetensors.torch.save(tensors, recorded))
    card = {
        "about": about | {"epoch": best["record"]["epoch"]},
        "classes": list(classes),
        "normalization": _plain(normalization),
        "white_values": asdict(whites),
        "trial": trial.to_mapping(),
    }
    if layout is not None:
        card["classifier"] = layout.classifier
    validation = {} if value is None else measured
    answers = None if value is None else best.get(ANSWERS)
    write_model_card(
        temporary, classes, trial, about, validation, answers, is_timm=layout is not None
    )
    card["weights_sha256"] = sha256_of(temporary / WEIGHTS_NAME)
    (temporary / ABOUT_NAME).write_text(_sealed(to_yaml(card)))
    write_sums(temporary)
    for path in (*temporary.iterdir(), temporary):
        flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    flush(folder.parent)


def is_sound(folder: Path) -> bool:
    """Return whether a folder holds a model, with the checksums that were recorded."""
    try:
        card = _read_card(folder / ABOUT_NAME)
        return card.get("weights_sha256") in (None, sha256_of(folder / WEIGHTS_NAME))
    except (DrtuneError, OSError):
        return False


def read_about(folder: Path) -> dict[str, Any]:
    """Return the origin and the accuracy of the model in a folder; empty if there is none."""
    path = folder / ABOUT_NAME
    return dict(_read_card(path)["about"]) if path.exists() else {}


def _sealed(text: str) -> str:
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _read_card(path: Path) -> dict[str, Any]:
    text, seal, _ = path.read_bytes().decode(errors="replace").partition(SEAL)
    if seal and path.read_bytes() != _sealed(text).encode():
        raise _damaged(path, "the checksum is another")
    if not seal and (path.parent / SUMS_NAME).exists():  # models of 0.1.0 have neither
        raise _damaged(path, "its end is missing")
    card = read_yaml(path)
    for name, kind in CARD.items():
        if not isinstance(card.get(name), kind):
            raise _damaged(path, f"wrong value of {name!r}")
    return card


def _damaged(path: Path, reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{path} is damaged ({reason}): repeat the command that trained the model, which writes it "
        f"again, or bring it back from MLflow ({path.parent.name} of the study's run)"
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
        if "classifier" in card:  # models of 0.1.0 have names of their own
            weights = from_timm(weights, card["classifier"])
        if len(weights[HEAD_WEIGHT]) != len(card["classes"]):
            raise _damaged(folder, "not as many outputs as classes")
        normalization = read_normalization(card["normalization"])
        whites = WhiteValues(**card.get("white_values", {}))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, first_line(error)) from None
    model = classifier(trial.backbone.name, trial.data.image_size, weights)
    return Winner(
        model,
        tuple(card["classes"]),
        normalization,
        trial,
        card["about"],
        whites,
    )


def read_normalization(values: dict[str, Any]) -> Normalization:
    """Return the normalization that a model's card records as plain values."""
    mean, std = _three(values["mean"]), _three(values["std"])
    return Normalization(mean, std, str(values["interpolation"]))


def _three(values: Iterable[Any]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue
