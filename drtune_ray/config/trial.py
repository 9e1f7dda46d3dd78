"""Configuration as data: typed, frozen, refused early with every problem at once.

Precedence: ``--set path=value`` > file > preset > default. ``TrialConfig`` decides one training;
``StudyConfig`` a search over trials. The resolved configuration is saved with each study.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from drtune_ray.config.presets import PRESETS, PresetName
from drtune_ray.config.section import Probability, Section, Workers, unknown_name, validated
from drtune_ray.errors import ConfigError
from drtune_ray.values import deep_merge, digest, flattened, nested

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class CalibrationConfig(Section):
    """Semantic calibration; see `drtune_ray.method.SemanticCalibration` for each meaning.

    `rotation_rank` and `rotation_shrinkage` are read by the solver ``randomized`` only,
    `proper_rotation` by ``svd`` only.
    """

    rotation: bool = True
    rotation_interval: PositiveInt = 10
    rotation_solver: Literal["randomized", "svd"] = "randomized"
    rotation_rank: PositiveInt = 32
    rotation_shrinkage: NonNegativeFloat = 0.02
    rotation_kept: bool = True
    rotation_restarts_each_epoch: bool = False
    proper_rotation: bool = False
    recenter: bool = True
    normalize: bool = True
    translation: bool = True
    confidence_weighting: bool = True
    confidence_temperature: PositiveFloat = 0.1
    similarity: Literal["cosine", "dot"] = "cosine"


class MethodConfig(Section):
    """What is trained: DR-Tune, or CE-tuning, which reads none of the other settings.

    `regularization_weight` is lambda of eq. 14; ``bank_over_batch`` means K/B and
    ``one_plus_bank_over_batch`` 1 + K/B, with K = min(bank_size, training images) and B the
    global batch size, fixed for the whole trial.
    """

    name: Literal["dr_tune", "ce_tuning"] = "dr_tune"
    regularization_weight: NonNegativeFloat | Literal["bank_over_batch"] = 1.0
    reduction: Literal["sum", "mean"] = "sum"
    bank_size: PositiveInt = 512
    head_lr_multiplier: PositiveFloat | Literal["one_plus_bank_over_batch"] = 1.0
    calibration: CalibrationConfig = CalibrationConfig()


class OptimConfig(Section):
    """Optimiser and learning-rate schedule; `momentum` and `nesterov` are read by SGD only."""

    name: Literal["sgd", "adamw"] = "sgd"
    backbone_lr: PositiveFloat = 0.001
    weight_decay: NonNegativeFloat = 1e-4
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = False
    schedule: Literal["cosine", "cosine_per_epoch", "constant"] = "cosine"

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov=true needs momentum > 0, but got momentum=0")
        return self


class TrainingConfig(Section):
    """The loop. `batch_size` is global: it is divided among the workers.

    `workers` is their number; ``[min, max]`` lets Ray Train take what the cluster has at the time
    (`drtune-ray train` only). It changes the speed and the rounding, not the experiment.
    `stop_epoch` ends the training early, on the schedule of all `epochs`.

    `precision` ``auto`` is bfloat16 (or float16) mixed precision on CUDA devices and float32 on
    CPUs; ``float64`` shows what is exact where float32 lets rounding errors grow.
    """

    epochs: PositiveInt = 10
    stop_epoch: PositiveInt | None = None
    batch_size: PositiveInt = 32
    workers: Workers = 1
    batch_norm: Literal["frozen", "synchronised", "local"] = "frozen"
    drop_last: bool = False
    patience_epochs: PositiveInt | None = None
    precision: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    save_every_seconds: PositiveFloat = 300.0

    @model_validator(mode="after")
    def _stops_within_the_schedule(self) -> Self:
        if self.stop_epoch is not None and self.stop_epoch > self.epochs:
            raise ValueError(
                f"stop_epoch <= epochs must hold, but got {self.stop_epoch} and {self.epochs}"
            )
        return self

    @property
    def last_epoch(self) -> int:
        """The epoch after which it ends."""
        return self.stop_epoch or self.epochs

    @property
    def min_workers(self) -> int:
        """With how few workers it trains."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """With how many workers it trains where there is room."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class DataConfig(Section):
    """The images, their splits and their views.

    `train` is a folder of class folders. `views` = V > 0 gives each image V seeded augmentations
    (epoch e uses view e mod V) whose frozen features are computed once; 0 augments afresh in each
    epoch and runs the frozen encoder at every step.

    Training views are random crops of `crop_scale_min` to 1 of the image, mirrored with probability
    `horizontal_flip`. Evaluation resizes to `image_size` / `crop_fraction` (its shorter side, or
    both as the authors' code does) and takes the centre.

    `cache_limit_gib` bounds the storage's prepared tables: when a study starts, those that no
    running study uses are removed, least recently used first. Encoded images, weights and frozen
    features are always written, since a trial needs them; the pixels of the views only where they
    fit beside these, otherwise each epoch decodes and augments again.
    """

    train: str
    train_per_class: PositiveInt | None = None
    validation_fraction: Fraction = 0.2
    test_fraction: Fraction = 0.2
    image_size: Annotated[int, Field(ge=16)] = 224
    views: Annotated[int, Field(ge=0)] = 8
    view_seed: int = 0
    crop_scale_min: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    horizontal_flip: Probability = 0.5
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.875
    evaluation_resize: Literal["shorter_side", "square"] = "shorter_side"
    loader_workers: Annotated[int, Field(ge=0)] = 0
    cache_limit_gib: NonNegativeFloat = 4.0

    @model_validator(mode="after")
    def _some_images_remain(self) -> Self:
        held_out = self.validation_fraction + self.test_fraction
        if self.train_per_class is None and held_out >= 1.0:
            raise ValueError(
                "validation_fraction + test_fraction < 1 must hold, but got "
                f"{self.validation_fraction} + {self.test_fraction}"
            )
        return self


class BackboneConfig(Section):
    """A timm model and where its pretrained weights come from.

    `weights` is ``timm`` (its hub), ``demo`` (EfficientNet-Lite0 from the package of the demo
    extra) or a file.
    """

    name: str = "tf_efficientnet_lite0"
    weights: str = "timm"


class TrialConfig(Section):
    """Everything that decides one training."""

    data: DataConfig
    backbone: BackboneConfig = BackboneConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    seed: int = 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, preset: str | None = None) -> Self:
        """Validate a nested mapping; its own key ``preset`` names one of `PRESETS` too.

        Raises:
            ConfigError: Naming every problem.
        """
        return validated(cls, on_preset(values, preset or "default"))

    def to_mapping(self) -> dict[str, Any]:
        """Nested plain values, as they stand in YAML."""
        return self.model_dump(mode="json")

    @property
    def tables_key(self) -> str:
        """Trials of one key read the same prepared tables."""
        values = flattened(self.to_mapping())
        return digest([values[path] for path in TABLES_PATHS])

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """A copy with dotted paths replaced, validated as a whole."""
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
    "data.crop_fraction",
    "data.evaluation_resize",
)
# Settings of a trial that change where and how fast it runs, not what comes out but for rounding.
TRIAL_NOT_DECIDING = (
    "data.train",
    "data.loader_workers",
    "data.cache_limit_gib",
    "backbone.weights",
    "training.workers",
    "training.save_every_seconds",
)


def on_preset(values: Mapping[str, Any], default: str) -> dict[str, Any]:
    """The values on top of the preset that their key ``preset`` names."""
    rest = dict(values)
    preset = rest.pop("preset", None) or default
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(unknown_name("preset", str(preset), get_args(PresetName)))
    return deep_merge(PRESETS[preset], rest)
