"""Settings of a trial: typed, frozen, rejected early with every problem at once.

Precedence: ``--set path=value`` > file > preset > default. The resolved configuration is saved with
each study. The text under a field is its documentation: ``--help``, search_spaces/schema.json and
docs/settings.md show it. Brackets at its end hold the source: an equation or section of the paper
(ICCV 2023, arXiv 2308.12058), the authors' code (commit ef9a7b1) or a library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self, get_args

from pydantic import model_validator

from drtune_ray.config.inputs import BackboneConfig, DataConfig
from drtune_ray.config.method import MethodConfig
from drtune_ray.config.metric import DEFAULT_METRIC
from drtune_ray.config.presets import PRESETS, PresetName
from drtune_ray.config.section import Section, unknown_name, validated
from drtune_ray.config.training import OptimConfig, TrainingConfig
from drtune_ray.errors import ConfigError
from drtune_ray.values import deep_merge, digest, flattened, flattened_without, nested


class TrialConfig(Section):
    """Configuration of one training."""

    data: DataConfig
    """Images, their splits and their views."""

    backbone: BackboneConfig = BackboneConfig()
    """Pretrained vision model."""

    method: MethodConfig = MethodConfig()
    """Fine-tuning method."""

    optim: OptimConfig = OptimConfig()
    """Optimiser and learning-rate schedule."""

    training: TrainingConfig = TrainingConfig()
    """Training loop."""

    seed: int = 0
    """Random seed for the head's initial weights, the order of the images and dropout."""

    @model_validator(mode="after")
    def _warmup_ends_before_the_training(self) -> Self:
        warmup, epochs = self.optim.warmup_epochs, self.training.epochs
        if warmup >= epochs:
            raise ValueError(
                "optim.warmup_epochs < training.epochs must hold, but got "
                f"warmup_epochs={warmup:g} and epochs={epochs}"
            )
        return self

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, preset: str | None = None) -> Self:
        """Validate a nested mapping; its own key ``preset`` names one of `PRESETS` too.

        Raises:
            ConfigError: Naming every problem.
        """
        return validated(cls, on_preset(values, preset or "default"))

    def to_mapping(self) -> dict[str, Any]:
        """Return nested plain values, as YAML holds them."""
        return self.model_dump(mode="json")

    @property
    def tables_key(self) -> str:
        """Key shared by all trials that read the same prepared tables."""
        values = flattened(self.to_mapping())
        return digest([values[path] for path in TABLES_PATHS])

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with dotted paths replaced, validated as a whole."""
        return validated(type(self), deep_merge(self.to_mapping(), nested(values)))


# Settings of a trial that decide the tables it reads: images in views, and frozen features.
TABLES_PATHS = (
    "backbone.name",
    "backbone.weights",
    "data.image_size",
    "data.views",
    "data.view_seed",
    "data.crop_scale_min",
    "data.horizontal_flip",
    "data.augmentation",
    "data.augmentation_magnitude",
    "data.random_erasing",
    "data.crop_fraction",
    "data.evaluation_resize",
)
# Settings of a trial that change where and how fast it runs, not what comes out but for rounding.
TRIAL_NOT_DECIDING = (
    "data.train",
    "data.skip_bad",  # the digest of the images covers what is left, and what the columns hold
    "data.image_column",
    "data.label_column",
    "data.split_column",
    "data.group_column",
    "data.loader_workers",
    "data.cache_limit_gib",
    "backbone.weights",
    "backbone.weights_key",
    "backbone.weights_format",
    "backbone.allow_missing",
    "training.workers",
    "training.accumulation_steps",
    "training.compile",
    "training.save_every_seconds",
)
# Settings that earlier records and checkpoints lack, each with the value under which a trial comes
# out as it did before the setting existed.
TRIAL_ADDED: dict[str, Any] = {
    "data.train_share": 1.0,
    "data.folds": None,
    "data.fold": 0,
    "data.fold_seed": 0,
    "backbone.mean": None,
    "backbone.std": None,
    "training.metric": DEFAULT_METRIC,
    "backbone.weights_format": None,
    "backbone.frozen_layers": 0,
    "backbone.frozen_patterns": [],
    "training.accumulation_steps": 1,
    "training.ema_decay": None,
    "training.compile": False,
    "optim.layer_decay": 1.0,
    "optim.clip_norm": None,
    "optim.warmup_epochs": 0.0,
    "optim.step_epochs": 5,
    "optim.step_gamma": 0.1,
    "backbone.drop_path": 0.0,
    "backbone.dropout": 0.0,
    "data.augmentation": "none",
    "data.augmentation_magnitude": 9,
    "data.random_erasing": 0.0,
    "data.sampling": "uniform",
    "training.label_smoothing": 0.0,
    "training.class_weights": "none",
    "training.mixup": 0.0,
    "training.cutmix": 0.0,
    "method.l2_sp_weight": 0.1,
    "method.l2_sp_head_weight": 0.01,
    "method.bss_weight": 0.001,
    "method.bss_num_values": 1,
    "method.ldifs_weight": 10.0,
    "method.probe_share": 0.5,
    "method.spd_weight": 1.0,
    "method.ftp_annealing": 1.0,
    "method.scl_weight": 0.9,
    "method.scl_temperature": 0.3,
}


def deciding_settings(values: Mapping[str, Any], not_deciding: Iterable[str]) -> dict[str, Any]:
    """Return the flat settings of a trial or study that decide its results.

    Settings of `TRIAL_ADDED` with the value given there are left out, so that what was recorded
    before they existed stays equal.
    """
    kept = flattened_without(values, not_deciding)
    absent = object()
    added = TRIAL_ADDED | {f"trial.{path}": value for path, value in TRIAL_ADDED.items()}
    return {path: value for path, value in kept.items() if value != added.get(path, absent)}


def on_preset(values: Mapping[str, Any], default: str) -> dict[str, Any]:
    """Return the values on top of the preset that their key ``preset`` names."""
    rest = dict(values)
    preset = rest.pop("preset", None) or default
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(unknown_name("preset", str(preset), get_args(PresetName)))
    return deep_merge(PRESETS[preset], rest)
