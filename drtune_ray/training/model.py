"""Build the modules of one trial from its configuration."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from torch import nn

from drtune_ray.config.training import TrainingConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.method import Method
from drtune_ray.training.backbones import Backbone, create_encoder
from drtune_ray.training.distributed import ProcessGroup
from drtune_ray.training.layers import freeze
from drtune_ray.training.methods import (
    PretrainedEncoder,
    check_encoder,
    check_method,
    method_of,
    trial_dtype,
)
from drtune_ray.training.reports import outcome_of_settings
from drtune_ray.training.validation import most_scores
from drtune_ray.values import digest

HEAD_INIT_STD = 0.01
ANOTHER_BATCH = "set training.drop_last=true or another training.batch_size"


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
    problems += check_method(config)
    if training.max_workers > 1 and training.batch_norm == "local":
        problems.append(
            "training.batch_norm=local normalises over a part of the batch with "
            f"training.workers={training.workers}: set frozen or synchronised"
        )
    if training.max_workers > 1 and training.batch_norm == "synchronised":
        problems += _synchronised_problems(training, num_train, on_gpus)
    return problems


def check_metrics(
    config: TrialConfig, validation_sizes: Sequence[int], objectives: Sequence[str] = ()
) -> list[str]:
    """Return a sentence if the metric that chooses, or one among the objectives, is not measured.

    Args:
        config: Configuration of the trial.
        validation_sizes: Number of validation images of each class.
        objectives: Objectives of the study.
    """
    num_images, num_classes = sum(validation_sizes), len(validation_sizes)
    metric = config.training.metric
    if "auroc" not in (metric, *objectives) or not num_images:
        return []
    what = "training.metric=auroc" if metric == "auroc" else f"the objective auroc after {metric}"
    if max(validation_sizes) == num_images:
        return [
            f"{what} needs validation images of two classes, but all {num_images} are of one: "
            "raise data.validation_fraction or take another metric"
        ]
    if num_images * num_classes > (most := most_scores(metric)):
        return [
            f"{what} compares at most {most} scores, but got {num_images} validation images of "
            f"{num_classes} classes: lower data.validation_fraction or take another "
            "metric"
        ]
    return []


def check_layers(config: TrialConfig, backbone: Backbone) -> list[str]:
    """Return a sentence if the frozen parameters or the method do not fit the backbone.

    Args:
        config: Configuration of the trial.
        backbone: Pretrained encoder.
    """
    if not config.backbone.frozen_patterns and config.method.name not in ("ldifs", "bitfit"):
        return []
    with torch.device("meta"):
        encoder = create_encoder(backbone.name, backbone.image_size)
    try:
        freeze(encoder, config.backbone)
    except ConfigError as error:
        return list(error.problems)
    return check_encoder(config, encoder, backbone.image_size)


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
    config: TrialConfig,
    backbone: Backbone,
    num_classes: int,
    num_train: int,
    live_features: bool,
    class_weights: torch.Tensor | None = None,
) -> Method:
    """Build the modules of a trial on the CPU, with weights that depend on the seed alone.

    All are in float32 but a frozen encoder, which is in the precision of the trial.

    Args:
        config: Configuration of the trial.
        backbone: Pretrained encoder.
        num_classes: C, number of classes.
        num_train: N, number of training images.
        live_features: Whether the frozen encoder runs at every step.
        class_weights: Weights of the classes in the loss, (C,); 1 by default.
    """
    encoder = backbone.build(config.backbone)
    freeze(encoder, config.backbone)
    head = nn.Linear(backbone.num_features, num_classes)
    nn.init.normal_(head.weight, std=HEAD_INIT_STD, generator=generator(config.seed, "head"))
    nn.init.zeros_(head.bias)
    pretrained = PretrainedEncoder(backbone, trial_dtype(config), live_features)
    method = method_of(config, encoder, head, pretrained, num_train, class_weights)
    method.collective = ProcessGroup()
    return method


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


def classifier_state(encoder: nn.Module, head: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors for :func:`classifier`, copied to the CPU."""
    parts = (("encoder", encoder), ("head", head))
    return {
        f"{prefix}.{name}": tensor.detach().cpu().clone()
        for prefix, module in parts
        for name, tensor in module.state_dict().items()
    }


def set_training_mode(method: Method, batch_norm: str) -> None:
    """Set train mode; with ``frozen``, BatchNorm layers keep their pretrained statistics.

    Modules without a trained parameter stay in eval mode: a frozen layer computes what the
    pretrained one does.
    """
    method.train()
    for module in method.downstream_encoder.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
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
