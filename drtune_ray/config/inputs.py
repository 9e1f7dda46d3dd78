"""Settings of a trial: images and pretrained model.

See :mod:`drtune_ray.config.trial` for the form of the texts under the fields.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from drtune_ray.config.section import Probability, Rate, Section
from drtune_ray.config.weights_formats import WeightsFormat

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Channels = tuple[Probability, Probability, Probability]
StandardDeviation = Annotated[float, Field(gt=0.0, le=1.0)]
StandardDeviations = tuple[StandardDeviation, StandardDeviation, StandardDeviation]


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
    """Labelled images: a folder of class folders, also below folders of splits; a list of paths and
    labels (CSV, TSV, JSON lines); Parquet, Arrow or WebDataset shards; a saved Hugging Face
    dataset; or the URI of one of them in an object store."""

    image_column: str | None = None
    """Column of the images or their paths, in sources that have columns. Default: by its type or
    name."""

    label_column: str | None = None
    """Column of the classes. Default: by its type or name."""

    split_column: str | None = None
    """Column of the splits. Default: `split`, `subset` or `partition` where there is one."""

    group_column: str | None = None
    """Column of groups, such as patients: images of one group are never in different splits.
    Default: no groups."""

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

    train_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of each class's training images that is used, at least one; a smaller share is part of
    a larger one. Validation and test images stay the same. [paper: Table 5]"""

    folds: Annotated[int, Field(ge=2)] | None = None
    """Number K of equal parts, with the same share of each class, for cross-validation: `fold` is
    the test split, and `test_fraction` is not read. Default: no cross-validation. [scikit-learn
    `StratifiedGroupKFold`]"""

    fold: NonNegativeInt = 0
    """Part that is the test split, from 0 to K - 1; read where `folds` is set."""

    fold_seed: int = 0
    """Random seed of the division into parts; read where `folds` is set."""

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

    augmentation: Literal["none", "rand_augment", "trivial_augment"] = "none"
    """Further augmentation of the training views after crop and flip: RandAugment (2 operations of
    one strength) or TrivialAugment (1 operation of a random strength). [Cubuk et al. 2020; Mueller
    and Hutter 2021; torchvision `RandAugment`, `TrivialAugmentWide`]"""

    augmentation_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of the operations, of 0 to 30; read by `rand_augment` only.
    [torchvision `RandAugment`]"""

    random_erasing: Probability = 0.0
    """Probability that a rectangle of a training view, of 2 to 33 % of its area, is made grey.
    [Zhong et al. 2020; torchvision `RandomErasing`]"""

    sampling: Literal["uniform", "class_balanced"] = "uniform"
    """Images of an epoch: each once, or as many draws that give every class the same number, the
    images of a class repeated equally often, each time in another view."""

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
        test, name = self.test_fraction, "test_fraction"
        if self.folds is not None:
            test, name = 1 / self.folds, "1/folds"
        if self.train_per_class is None and self.validation_fraction + test >= 1.0:
            raise ValueError(
                f"validation_fraction + {name} < 1 must hold, but got "
                f"{self.validation_fraction} + {test:g}"
            )
        return self

    @model_validator(mode="after")
    def _fold_is_one_of_the_folds(self) -> Self:
        if self.folds is None:
            return self
        if self.fold >= self.folds:
            raise ValueError(
                f"fold < folds must hold, but got fold={self.fold} and folds={self.folds}"
            )
        if self.train_per_class is not None:
            raise ValueError(
                f"train_per_class={self.train_per_class} cannot be used with folds={self.folds}: "
                "leave one of them out"
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

    weights_format: WeightsFormat | None = None
    """Layout of the weights file (docs/weights.md). Default: as its keys tell."""

    allow_missing: bool = False
    """Start parameters that the weights file lacks at random; `false` refuses such a file."""

    frozen_layers: NonNegativeInt | Literal["all"] = 0
    """First layers that keep the pretrained weights: 1 is the stem or the embeddings, each further
    one a stage of a hierarchical backbone or a block of another one. `all`, or a number above
    theirs, freezes the whole backbone, a linear probe. [timm `group_matcher`]"""

    frozen_patterns: tuple[str, ...] = ()
    """Names of further parameters that keep the pretrained weights; `*` stands for any text, as in
    `blocks.0.*` or `*.bias`."""
    drop_path: Rate = 0.0
    """Rate of stochastic depth in the last block of the trained encoder; earlier blocks have less,
    by timm's rule. The frozen encoder drops nothing. [Huang et al. 2016; timm `drop_path_rate`]"""

    dropout: Rate = 0.0
    """Rate of dropout on the trained encoder's pooled features, before the head; the bank holds
    them as the head reads them. The frozen encoder drops nothing. [timm `drop_rate`]"""

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
