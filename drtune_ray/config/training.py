"""Settings of a trial: optimiser and training loop.

See :mod:`drtune_ray.config.trial` for the form of the texts under the fields.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from drtune_ray.config.metric import DEFAULT_METRIC, MetricName
from drtune_ray.config.optimizers import Optimizer
from drtune_ray.config.section import Rate, Section, Workers

MAX_EPOCHS = 100_000


class OptimConfig(Section):
    """Optimiser and learning-rate schedule."""

    name: Optimizer = "sgd"
    """Optimiser: `sgd`, `adamw`, or one of timm's; docs/recipe.md lists them.
    [PyTorch `SGD`, `AdamW`; timm `create_optimizer_v2`; sec. 4.2]"""

    backbone_lr: PositiveFloat = 0.001
    """Learning rate of the backbone at the first step, or at the end of the warmup.
    [paper: 0.01]"""

    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor of the learning rate from each layer of the backbone to the one before it; the last
    layer has this multiple of `backbone_lr`. [BEiT; timm `param_groups_layer_decay`]"""

    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay. All optimisers but `sgd` exempt biases, the affine parameters of normalisation
    layers, and what the backbone's `no_weight_decay` names, such as position embeddings and class
    tokens. [sec. 4.2; timm]"""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum; read by `sgd` and those of timm's optimisers that have one. [sec. 4.2]"""

    nesterov: bool = False
    """Use Nesterov momentum; read by `sgd` only. [authors' code: true]"""

    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient of all trained parameters together; a longer gradient is scaled
    down to it. Default: no limit. [PyTorch `clip_grad_norm_`]"""

    schedule: Literal["cosine", "cosine_per_epoch", "linear", "step", "constant"] = "cosine"
    """Learning-rate schedule over all of `training.epochs`: a cosine to 0 that changes at each step
    or at each epoch's start, a line to 0, steps, or a constant.
    [sec. 4.2: cosine; authors' code: cosine_per_epoch]"""

    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs, also a part of one, over which the learning rates rise in equal steps; the schedule
    runs over those that are left. [Goyal et al. 2017]"""

    step_epochs: PositiveInt = 5
    """Epochs between two steps of the schedule `step`, counted from the training's start.
    [PyTorch `StepLR`]"""

    step_gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Factor of the learning rates at each step of the schedule `step`. [PyTorch `StepLR`]"""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov=true needs momentum > 0, but got momentum=0")
        return self


class TrainingConfig(Section):
    """Training loop of a trial."""

    epochs: Annotated[PositiveInt, Field(le=MAX_EPOCHS)] = 10
    """Epochs of a trial, over which the learning-rate schedule runs. [paper: 100]"""

    stop_epoch: PositiveInt | None = None
    """Epoch after which training ends, on the schedule of all `epochs`. Default: the last one."""

    batch_size: PositiveInt = 32
    """Images per optimiser step, divided among the workers. [paper: 64]"""

    workers: Workers = 1
    """Ray Train workers of a trial. In a file of `drtune-ray train`, [min, max] uses as many as the
    cluster has room for. The number changes speed and rounding, not the experiment.
    [Ray Train `ScalingConfig`]"""

    accumulation_steps: PositiveInt = 1
    """Parts into which a batch is cut so that it fits into memory: at most
    ceil(batch_size / accumulation_steps) images run at once, and their gradients are summed. The
    number changes speed and rounding, not the experiment; BatchNorm must be frozen."""

    batch_norm: Literal["frozen", "synchronised", "local"] = "frozen"
    """Statistics of BatchNorm layers: the pretrained ones, those of the global batch, or those of
    each worker's part of it. [PyTorch `SyncBatchNorm`; authors' code: local]"""

    drop_last: bool = False
    """Leave out an epoch's last batch where it is smaller than `batch_size`.
    [authors' code: true]"""

    patience_epochs: PositiveInt | None = None
    """Epochs without a better value of `metric` after which a trial ends. Default: no limit."""

    metric: MetricName = DEFAULT_METRIC
    """Metric of the validation images that chooses the best epoch; in a study always the first of
    the `objectives`, which then chooses trials and winner too."""

    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay d of the exponential moving average of the weights, which is d times the last average
    plus 1 - d times the new weights after each step, and those of the first step at the start. The
    average is what is validated, kept and shipped. Default: none. [PyTorch `AveragedModel`]"""

    label_smoothing: Rate = 0.0
    """Share of each image's target that is spread evenly over all classes, in the cross-entropy of
    the images; the distribution regularization keeps the labels of the bank. [Szegedy et al. 2016;
    eq. 5]"""

    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in both parts of the loss: `balanced` is n / (C n_c) for n_c of n
    training images in a class. No effect where `data.sampling` is `class_balanced`, since classes
    are drawn equally often there. [scikit-learn `compute_class_weight`]"""

    mixup: NonNegativeFloat = 0.0
    """Parameter alpha of mixup, 0 for none: images of a batch and their targets are mixed in pairs
    for the cross-entropy. The bank and the distribution regularization take the images unmixed, by
    a second forward pass. With `cutmix` too, each step draws one of both. [Zhang et al. 2018; timm
    `Mixup`]"""

    cutmix: NonNegativeFloat = 0.0
    """Parameter alpha of CutMix, 0 for none: as `mixup`, but a rectangle of one image is put into
    the other. [Yun et al. 2019; timm `Mixup`]"""

    precision: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """Floating-point precision: `auto` is mixed precision on GPUs (bfloat16, or float16 where the
    GPU has none) and float32 on CPUs. [PyTorch `autocast`]"""

    compile: bool = False
    """Compile the encoders at the first step: minutes at the start, faster steps on GPUs, other
    rounding. On CPUs it needs a C++ compiler. [PyTorch `torch.compile`]"""

    save_every_seconds: PositiveFloat = 300.0
    """Seconds between checkpoints within an epoch; each epoch's end is saved as well, while the
    next epoch trains."""

    @model_validator(mode="after")
    def _stops_within_the_schedule(self) -> Self:
        if self.stop_epoch is not None and self.stop_epoch > self.epochs:
            raise ValueError(
                f"stop_epoch <= epochs must hold, but got {self.stop_epoch} and {self.epochs}"
            )
        return self

    @model_validator(mode="after")
    def _cuts_a_batch(self) -> Self:
        if self.accumulation_steps > self.batch_size:
            raise ValueError(
                "accumulation_steps <= batch_size must hold, but got "
                f"{self.accumulation_steps} and {self.batch_size}"
            )
        if self.accumulation_steps > 1 and self.batch_norm != "frozen":
            raise ValueError(
                f"batch_norm={self.batch_norm} would normalise over each part of a batch with "
                f"accumulation_steps={self.accumulation_steps}: set batch_norm=frozen, or "
                "accumulation_steps=1"
            )
        return self

    @model_validator(mode="after")
    def _mixes_pairs_of_a_batch(self) -> Self:
        is_mixed = self.mixup > 0.0 or self.cutmix > 0.0
        if is_mixed and self.batch_size == 1:
            raise ValueError(
                "mixup and cutmix mix pairs of a batch, but got batch_size=1: set it to at least "
                "2, or both of them to 0"
            )
        if is_mixed and self.accumulation_steps > 1:
            raise ValueError(
                "mixup and cutmix mix pairs of a whole batch, but got "
                f"accumulation_steps={self.accumulation_steps}: set it to 1, or both of them to 0"
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
