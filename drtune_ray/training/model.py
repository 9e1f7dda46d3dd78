"""Build the modules of one trial from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import nn

from drtune_ray.config.trial import TrainingConfig, TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.method import CETuning, DRTune, FeatureBank, SemanticCalibration
from drtune_ray.training.backbones import Backbone, create_encoder
from drtune_ray.training.distributed import ProcessGroup
from drtune_ray.training.reports import outcome_of_settings
from drtune_ray.values import digest

HEAD_INIT_STD = 0.01
ANOTHER_BATCH = "set training.drop_last=true or another training.batch_size"
Method = DRTune | CETuning


@dataclass(frozen=True)
class MethodScale:
    """Settings that depend on the number of training images, fixed for the whole trial.

    Attributes:
        bank_size: K = min(bank_size, number of training images).
        regularization_weight: lambda of eq. 14.
        head_lr_multiplier: Learning rate of the head divided by that of the backbone.
    """

    bank_size: int
    regularization_weight: float
    head_lr_multiplier: float


def method_scale(config: TrialConfig, num_train: int) -> MethodScale:
    """Resolve K, ``bank_over_batch`` and ``one_plus_bank_over_batch``."""
    bank_size = min(config.method.bank_size, num_train)
    ratio = bank_size / config.training.batch_size
    weight, multiplier = config.method.regularization_weight, config.method.head_lr_multiplier
    return MethodScale(
        bank_size,
        ratio if weight == "bank_over_batch" else float(weight),
        1.0 + ratio if multiplier == "one_plus_bank_over_batch" else float(multiplier),
    )


def check_trial(config: TrialConfig, num_train: int, *, on_gpus: bool = False) -> list[str]:
    """Return a sentence for each setting that cannot work with this many training images.

    Args:
        config: Configuration of the trial.
        num_train: N, number of training images.
        on_gpus: Whether the workers of the trial have GPUs; this process need not have one.
    """
    problems = []
    training = config.training
    if training.batch_size > num_train:
        problems.append(
            "training.batch_size <= number of training images must hold, but got "
            f"batch_size={training.batch_size} with {num_train} images; set training.batch_size "
            f"to at most {num_train}"
        )
    if training.max_workers > 1 and training.batch_norm == "local":
        problems.append(
            "training.batch_norm=local normalises over a part of the batch with "
            f"training.workers={training.workers}: set frozen or synchronised"
        )
    if training.max_workers > 1 and training.batch_norm == "synchronised":
        problems += _synchronised_problems(training, num_train, on_gpus)
    return problems


def _synchronised_problems(training: TrainingConfig, num_train: int, on_gpus: bool) -> list[str]:
    problems, last = [], num_train % training.batch_size
    if not on_gpus:
        problems.append(
            "training.batch_norm=synchronised needs a GPU for each of several workers: set "
            "resources.gpus_per_worker or training.batch_norm=frozen"
        )
    # A worker without a row runs a spare one, which would enter the statistics.
    if training.batch_size < training.max_workers:
        problems.append(
            f"training.batch_norm=synchronised needs a row for each of {training.max_workers} "
            f"workers, but got training.batch_size={training.batch_size}: set it to at least "
            f"{training.max_workers}"
        )
    elif 0 < last < training.max_workers and not training.drop_last:
        problems.append(
            f"training.batch_norm=synchronised needs a row for each of {training.max_workers} "
            f"workers, but the last batch of {num_train} images has {last}: "
            f"{ANOTHER_BATCH}"
        )
    return problems


def check_last_batch(config: TrialConfig, num_train: int, backbone: Backbone) -> list[str]:
    """Return a sentence if BatchNorm would have to normalise a single value per channel.

    The encoder runs without data: PyTorch checks the shapes alone.

    Args:
        config: Configuration of the trial.
        num_train: N, number of training images.
        backbone: Pretrained encoder.
    """
    training = config.training
    last = num_train % training.batch_size or training.batch_size
    is_run = last == training.batch_size or not training.drop_last
    if training.batch_norm == "frozen" or last != 1 or not is_run:
        return []
    with torch.device("meta"):
        encoder = create_encoder(backbone.name, backbone.image_size).train()
        images = torch.empty(1, 3, backbone.image_size, backbone.image_size)
    try:
        encoder(images)
    except ValueError as error:
        if outcome_of_settings(error) is None:
            raise
        return [
            f"training.batch_norm={training.batch_norm} cannot normalise a batch of one image, and "
            f"the last batch of {num_train} images has one with "
            f"training.batch_size={training.batch_size}: {ANOTHER_BATCH}, or "
            "training.batch_norm=frozen"
        ]
    return []


def build_method(
    config: TrialConfig, backbone: Backbone, num_classes: int, num_train: int, live_features: bool
) -> Method:
    """Build the modules of a trial on the CPU, with weights that depend on the seed alone.

    Args:
        config: Configuration of the trial.
        backbone: Pretrained encoder.
        num_classes: C, number of classes.
        num_train: N, number of training images.
        live_features: Whether the frozen encoder runs at every step.
    """
    encoder = backbone.build()
    head = nn.Linear(backbone.num_features, num_classes)
    nn.init.normal_(head.weight, std=HEAD_INIT_STD, generator=generator(config.seed, "head"))
    nn.init.zeros_(head.bias)
    method: Method
    if config.method.name == "ce_tuning":
        method = CETuning(encoder, head)
    else:
        frozen = backbone.build_frozen() if live_features else None
        method = _dr_tune(config, encoder, head, frozen, num_train)
    method.collective = ProcessGroup()
    return method


def _dr_tune(
    config: TrialConfig,
    encoder: nn.Module,
    head: nn.Linear,
    frozen: nn.Module | None,
    num_train: int,
) -> DRTune:
    scale, num_features = method_scale(config, num_train), head.in_features
    calibration = config.method.calibration
    return DRTune(
        encoder,
        head,
        FeatureBank(scale.bank_size, num_features),
        SemanticCalibration(
            num_features,
            rotation=calibration.rotation,
            rotation_interval=calibration.rotation_interval,
            rotation_solver=calibration.rotation_solver,
            rotation_rank=calibration.rotation_rank,
            rotation_shrinkage=calibration.rotation_shrinkage,
            rotation_kept=calibration.rotation_kept,
            restart_each_epoch=calibration.rotation_restarts_each_epoch,
            proper_rotation=calibration.proper_rotation,
            recenter=calibration.recenter,
            normalize=calibration.normalize,
            translation=calibration.translation,
            confidence_weighting=calibration.confidence_weighting,
            confidence_temperature=calibration.confidence_temperature,
            similarity=calibration.similarity,
        ),
        frozen,
        regularization_weight=scale.regularization_weight,
        reduction=config.method.reduction,
    )


def classifier(backbone_name: str, image_size: int, state: dict[str, torch.Tensor]) -> nn.Module:
    """Build the trained model: encoder and head, images (B, 3, S, S) to logits (B, C).

    Args:
        backbone_name: Name of the backbone in timm.
        image_size: S, side of the images in pixels.
        state: ``encoder.*`` and ``head.*`` tensors, as :func:`classifier_state` returns them.

    Raises:
        ConfigError: If the tensors do not fit this backbone.
    """
    model = nn.Sequential()
    model.add_module("encoder", create_encoder(backbone_name, image_size))
    num_classes, num_features = state["head.weight"].shape
    model.add_module("head", nn.Linear(num_features, num_classes))
    try:
        model.load_state_dict(state)
    except RuntimeError:
        wanted = model.state_dict()
        other = sorted(
            name
            for name in wanted.keys() | state.keys()
            if name not in wanted or name not in state or wanted[name].shape != state[name].shape
        )
        raise ConfigError(
            f"the weights do not fit {backbone_name} of timm {timm.__version__}: {len(other)} "
            f"tensors differ, such as {other[0]}; use the backbone and the version of timm that "
            "they were trained with"
        ) from None
    return model.eval()


def classifier_state(method: Method) -> dict[str, torch.Tensor]:
    """Return the tensors for :func:`classifier`, copied to the CPU."""
    parts = (("encoder", method.downstream_encoder), ("head", method.head))
    return {
        f"{prefix}.{name}": tensor.detach().cpu().clone()
        for prefix, module in parts
        for name, tensor in module.state_dict().items()
    }


def set_training_mode(method: Method, batch_norm: str) -> None:
    """Set train mode; with ``frozen``, BatchNorm layers keep their pretrained statistics."""
    method.train()
    if batch_norm == "frozen":
        for module in method.downstream_encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """Return a separate random generator for each (seed, purpose, index)."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, index))


def derived_seed(seed: int, purpose: str, index: int = 0, *more: int) -> int:
    """Return a separate random seed for each (seed, purpose, index, ...)."""
    return int(digest(seed, purpose, index, *more), 16) % 2**63
