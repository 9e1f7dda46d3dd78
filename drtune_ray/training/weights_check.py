"""What a weights file is and how it fits a backbone, whether or not a study would take it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm

from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.errors import ConfigError
from drtune_ray.training.backbones import (
    check_name,
    create_encoder,
    file_of,
    normalization_of,
    note_on,
)
from drtune_ray.training.weights_file import read_weights
from drtune_ray.training.weights_loading import KeyReport, try_weights


@dataclass(frozen=True)
class WeightsCheck:
    """A weights file beside a backbone.

    Attributes:
        path: The file.
        backbone: Name of the timm model.
        image_size: S, side of the images in pixels.
        report: How the tensors fit.
        normalization: Sentence about the normalization of the images.
        problem: Why a study refuses the file; None if it takes it.
    """

    path: Path
    backbone: str
    image_size: int
    report: KeyReport
    normalization: str
    problem: ConfigError | None


def check_weights(config: BackboneConfig, image_size: int | None = None) -> WeightsCheck:
    """Load a weights file into a backbone and report everything that was found.

    Args:
        config: Name of the backbone and the file.
        image_size: S, side of the images in pixels; None takes the size that timm names.

    Raises:
        ConfigError: If the backbone is unknown, or the file is none or cannot be read.
    """
    check_name(config.name)
    if config.weights == "timm":
        raise ConfigError("weights check reads a file, but got 'timm': give a file")
    path = file_of(config.weights)
    pretrained = timm.get_pretrained_cfg(config.name)
    size = image_size or (pretrained.input_size[-1] if pretrained else 224)
    content = read_weights(path, config.weights_key)
    encoder = create_encoder(config.name, size)
    report, problem = try_weights(encoder, content, config)
    used, is_recorded = (
        normalization_of(config, content, encoder),
        content.normalization is not None,
    )
    note = note_on(used, config, is_recorded=is_recorded)
    return WeightsCheck(path, config.name, size, report, note, problem)
