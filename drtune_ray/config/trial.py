"""Settings of a trial: typed, frozen, rejected early with every problem at once.

Precedence: ``--set path=value`` > file > preset > default. The resolved configuration is saved with
each study. The text under a field is its documentation: ``--help``, search_spaces/schema.json and
docs/settings.md show it. Brackets at its end hold the source: an equation or section of the paper
(ICCV 2023, arXiv 2308.12058), the authors' code (commit ef9a7b1) or a library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from drtune_ray.config.presets import PRESETS, PresetName
from drtune_ray.config.section import Probability, Section, Workers, unknown_name, validated
from drtune_ray.errors import ConfigError
from drtune_ray.values import deep_merge, digest, flattened, flattened_without, nested

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Channels = tuple[Probability, Probability, Probability]
StandardDeviation = Annotated[float, Field(gt=0.0, le=1.0)]
StandardDeviations = tuple[StandardDeviation, StandardDeviation, StandardDeviation]


class CalibrationConfig(Section):
    """Semantic calibration: moves the bank's pretrained features to the downstream features."""

    rotation: bool = True
    """Apply the global rotation R to all pretrained rows. [eq. 7]"""

    rotation_interval: PositiveInt = 10
    """Steps between two refreshes of R; 1 refreshes R at every step. [authors' code: 10]"""

    rotation_solver: Literal["randomized", "svd"] = "randomized"
    """Solver of R: `svd` is the exact minimiser, `randomized` a shrunk rotation of limited rank.
    [svd: Schoenemann 1966; randomized: Halko, Martinsson and Tropp 2011]"""

    rotation_rank: PositiveInt = 32
    """Rank r: number of directions that R rotates; read by the solver `randomized` only.
    [Halko, Martinsson and Tropp 2011]"""

    rotation_shrinkage: NonNegativeFloat = 0.02
    """Singular value, relative to the root of the sum of their squares, whose direction is shrunk
    to 0.71; 0 shrinks none. Read by the solver `randomized` only."""

    rotation_kept: bool = True
    """Apply the last R at the steps between refreshes too; `false` leaves those steps unrotated.
    [authors' code: false]"""

    rotation_restarts_each_epoch: bool = False
    """Count `rotation_interval` from the first step of each epoch, not of the training.
    [authors' code: true]"""

    proper_rotation: bool = False
    """Require det R = +1, which excludes reflections; read by the solver `svd` only.
    [Kabsch 1976; authors' code: true]"""

    recenter: bool = True
    """Move the rotated rows to the mean of the downstream rows; no effect where `translation` is
    on, because a common shift cancels in eq. 12. [authors' code: false]"""

    normalize: bool = True
    """L2-normalise the features before calibration, and scale the calibrated rows to the mean norm
    of the batch's downstream features. [authors' code; paper: raw features]"""

    translation: bool = True
    """Apply the class-level translation: shift each class to its downstream centre. [eq. 8, 11]"""

    confidence_weighting: bool = True
    """Weight the rows of a downstream class centre by the head's confidence; `false` takes the
    plain mean. [eq. 9-10]"""

    confidence_temperature: PositiveFloat = 0.1
    """Divisor of the similarities in the softmax of the confidence weights; lower values favour
    the most confident rows. [eq. 10 and authors' code: 1]"""

    similarity: Literal["cosine", "dot"] = "cosine"
    """Similarity of a row to its class prototype in the confidence weights.
    [eq. 10: dot; authors' code: cosine]"""


class MethodConfig(Section):
    """Fine-tuning method: DR-Tune, or CE-tuning, which reads `head_lr_multiplier` only.

    K is min(bank_size, number of training images) and B the global batch size; both are fixed for
    the whole trial.
    """

    name: Literal["dr_tune", "ce_tuning"] = "dr_tune"
    """Fine-tuning method: DR-Tune, or plain cross-entropy as the baseline. [ICCV 2023]"""

    regularization_weight: NonNegativeFloat | Literal["bank_over_batch"] = 1.0
    """Weight lambda of the distribution regularization in the loss; `bank_over_batch` is K/B.
    [eq. 14; paper: K/B]"""

    reduction: Literal["sum", "mean"] = "sum"
    """Combination of the losses: `sum` is CE + lambda DR, `mean` divides that by 1 + lambda.
    [eq. 14: sum; authors' code: mean]"""

    bank_size: PositiveInt = 512
    """Rows K of the feature bank; at most the number of training images takes effect.
    [sec. 3.3; paper: 2048]"""

    head_lr_multiplier: PositiveFloat | Literal["one_plus_bank_over_batch"] = 1.0
    """Learning rate of the head as a multiple of the backbone's; `one_plus_bank_over_batch` is
    1 + K/B. [sec. 4.2: 1 + K/B]"""

    calibration: CalibrationConfig = CalibrationConfig()
    """Semantic calibration of the bank's pretrained features. [sec. 3.4]"""


class OptimConfig(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser. [PyTorch `SGD`, `AdamW`; sec. 4.2]"""

    backbone_lr: PositiveFloat = 0.001
    """Learning rate of the backbone at the first step. [paper: 0.01]"""

    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay; AdamW exempts biases and the affine parameters of normalisation layers.
    [sec. 4.2]"""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum; read by `sgd` only. [sec. 4.2]"""

    nesterov: bool = False
    """Use Nesterov momentum; read by `sgd` only. [authors' code: true]"""

    schedule: Literal["cosine", "cosine_per_epoch", "constant"] = "cosine"
    """Learning-rate schedule over all of `training.epochs`: a cosine to 0 that changes at each step
    or at each epoch's start, or a constant. [sec. 4.2: cosine; authors' code: cosine_per_epoch]"""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov=true needs momentum > 0, but got momentum=0")
        return self


class TrainingConfig(Section):
    """Training loop of a trial."""

    epochs: Annotated[PositiveInt, Field(le=100_000)] = 10
    """Epochs of a trial, over which the learning-rate schedule runs. [paper: 100]"""

    stop_epoch: PositiveInt | None = None
    """Epoch after which training ends, on the schedule of all `epochs`. Default: the last one."""

    batch_size: PositiveInt = 32
    """Images per optimiser step, divided among the workers. [paper: 64]"""

    workers: Workers = 1
    """Ray Train workers of a trial. In a file of `drtune-ray train`, [min, max] uses as many as the
    cluster has room for. The number changes speed and rounding, not the experiment.
    [Ray Train `ScalingConfig`]"""

    batch_norm: Literal["frozen", "synchronised", "local"] = "frozen"
    """Statistics of BatchNorm layers: the pretrained ones, those of the global batch, or those of
    each worker's part of it. [PyTorch `SyncBatchNorm`; authors' code: local]"""

    drop_last: bool = False
    """Leave out an epoch's last batch where it is smaller than `batch_size`.
    [authors' code: true]"""

    patience_epochs: PositiveInt | None = None
    """Epochs without a better validation accuracy after which a trial ends. Default: no limit."""

    precision: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Floating-point precision: `auto` is mixed precision on GPUs (bfloat16, or float16 where the
    GPU has none) and float32 on CPUs. [PyTorch `autocast`]"""

    save_every_seconds: PositiveFloat = 300.0
    """Seconds between checkpoints within an epoch; each epoch's end is saved as well."""

    @model_validator(mode="after")
    def _stops_within_the_schedule(self) -> Self:
        if self.stop_epoch is not None and self.stop_epoch > self.epochs:
            raise ValueError(
                f"stop_epoch <= epochs must hold, but got {self.stop_epoch} and {self.epochs}"
            )
        return self

    @property
    def last_epoch(self) -> int:
        """Epoch after which the training ends."""
        return self.stop_epoch or self.epochs

    @property
    def min_workers(self) -> int:
        """Smallest number of workers that the training accepts."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Largest number of workers that the training uses."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class DataConfig(Section):
    """Images, their splits and their views.

    With `views` = V > 0 each image has V seeded augmentations (epoch e uses view e mod V) whose
    frozen features are computed once; 0 augments anew in each epoch and runs the frozen encoder at
    every step.

    `cache_limit_gib` applies when a study starts: prepared tables that no running study uses are
    removed, least recently used first. Encoded images, weights and frozen features are always
    written, since a trial needs them; the pixels of the views only where they fit beside these,
    otherwise each epoch decodes and augments again.
    """

    train: str
    """Folder of images with one subfolder per class."""

    skip_bad: bool = False
    """Leave out images that cannot be read or decoded, and report them, instead of refusing the
    whole folder."""

    train_per_class: PositiveInt | None = None
    """Training images per class; validation and test share the rest in the proportion of their
    fractions. Default: what the fractions leave."""

    validation_fraction: Fraction = 0.2
    """Share of each class's images for validation, which chooses epochs and winners."""

    test_fraction: Fraction = 0.2
    """Share of each class's images for the sealed test split."""

    image_size: Annotated[int, Field(ge=16)] = 224
    """Side of the square input images in pixels. [paper: 224]"""

    views: Annotated[int, Field(ge=0)] = 8
    """Seeded augmentations per image, reused in turn; 0 draws new ones in each epoch."""

    view_seed: int = 0
    """Random seed for the augmentations."""

    crop_scale_min: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """Smallest share of an image's area that a random training crop keeps; the largest is 1.
    [timm `create_transform`; authors' code: 0.4]"""

    horizontal_flip: Probability = 0.5
    """Probability that a training view is mirrored.
    [timm `create_transform`; authors' code: 0.5]"""

    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.875
    """Side of the central evaluation crop as a share of the resized image's.
    [timm `crop_pct`; authors' code: 224/256 = 0.875]"""

    evaluation_resize: Literal["shorter_side", "square"] = "shorter_side"
    """Resizing before the evaluation crop: keep the aspect ratio, or squash to a square.
    [timm `crop_mode`; authors' code: square]"""

    loader_workers: Annotated[int, Field(ge=0)] = 0
    """Processes per worker that decode and augment images; 0 uses the training process. Not used
    for views that are stored as pixels. [PyTorch `DataLoader`]"""

    cache_limit_gib: NonNegativeFloat = 4.0
    """Limit of the prepared tables under the storage, in GiB."""

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
    """Pretrained vision model."""

    name: str = "tf_efficientnet_lite0"
    """Name of a timm model. [timm `create_model`; paper: ResNet-50 and ViT-B]"""

    weights: str = "timm"
    """Pretrained weights: a file, `timm` (timm's hub), or `demo` (EfficientNet-Lite0 from the
    package of the demo extra). [timm]"""

    weights_key: str | None = None
    """Part of the weights file to take where it holds several, such as `state_dict_ema`. Default:
    averaged weights (EMA, teacher) where there are any, otherwise the first that fit."""

    allow_missing: bool = False
    """Start parameters that the weights file lacks at random; `false` refuses such a file."""

    mean: Channels | None = None
    """Mean of red, green and blue, for pixels in [0, 1], that the weights were trained with.
    Default: as recorded in the weights file, otherwise timm's for `name`."""

    std: StandardDeviations | None = None
    """Standard deviation of red, green and blue, set together with `mean`. Default: as `mean`."""

    @model_validator(mode="after")
    def _mean_and_std_together(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"mean and std must be set together, but got mean={self.mean} and std={self.std}"
            )
        return self


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
    "data.crop_fraction",
    "data.evaluation_resize",
)
# Settings of a trial that change where and how fast it runs, not what comes out but for rounding.
TRIAL_NOT_DECIDING = (
    "data.train",
    "data.skip_bad",  # the digest of the images covers what is left
    "data.loader_workers",
    "data.cache_limit_gib",
    "backbone.weights",
    "backbone.weights_key",
    "backbone.allow_missing",
    "training.workers",
    "training.save_every_seconds",
)
# Settings that earlier records and checkpoints lack; without a value they decide nothing.
TRIAL_ADDED = ("backbone.mean", "backbone.std")


def deciding_settings(values: Mapping[str, Any], not_deciding: Iterable[str]) -> dict[str, Any]:
    """Return the flat settings of a trial or study that decide its results.

    Settings of `TRIAL_ADDED` without a value are left out, so that what was recorded before they
    existed stays equal.
    """
    kept = flattened_without(values, not_deciding)
    added = {*TRIAL_ADDED, *(f"trial.{path}" for path in TRIAL_ADDED)}
    return {path: value for path, value in kept.items() if path not in added or value is not None}


def on_preset(values: Mapping[str, Any], default: str) -> dict[str, Any]:
    """Return the values on top of the preset that their key ``preset`` names."""
    rest = dict(values)
    preset = rest.pop("preset", None) or default
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(unknown_name("preset", str(preset), get_args(PresetName)))
    return deep_merge(PRESETS[preset], rest)
