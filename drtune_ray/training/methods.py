"""Methods of fine-tuning by their names in the settings, and one's own by its import path."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.method import (
    FTP,
    L2SP,
    LDIFS,
    LPFT,
    SPD,
    BatchSpectralShrinkage,
    BitFit,
    CETuning,
    DRTune,
    FeatureBank,
    LinearProbe,
    Method,
    Penalty,
    SemanticCalibration,
    SupervisedContrast,
    WiSEFT,
)
from drtune_ray.method.freezing import bias_and_norm_parameters
from drtune_ray.method.ldifs import captured, channel_axis
from drtune_ray.training.backbones import Backbone


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


def trial_dtype(config: TrialConfig) -> torch.dtype:
    """Return the precision of a trial's weights, images and bank."""
    return torch.float64 if config.training.precision == "float64" else torch.float32


@dataclass(frozen=True)
class PretrainedEncoder:
    """The encoder as it is before training.

    Attributes:
        backbone: Its weights.
        dtype: Precision of the trial.
        is_live: Whether z^p is computed at every step; otherwise it is prepared.
    """

    backbone: Backbone
    dtype: torch.dtype
    is_live: bool

    def for_features(self) -> nn.Module | None:
        """Build it to compute z^p; None where that is prepared."""
        return self.backbone.build_frozen(self.dtype) if self.is_live else None

    def copy(self) -> nn.Module:
        """Build it with the modules of the trained one."""
        return self.backbone.build()


@dataclass(frozen=True)
class _Parts:
    """What a method is built from; `common` are the arguments that all take."""

    config: TrialConfig
    encoder: nn.Module
    head: nn.Linear
    pretrained: PretrainedEncoder
    scale: MethodScale
    common: dict[str, Any]


def method_of(
    config: TrialConfig,
    encoder: nn.Module,
    head: nn.Linear,
    pretrained: PretrainedEncoder,
    num_train: int,
    class_weights: Tensor | None = None,
) -> Method:
    """Build the method that the settings name.

    Args:
        config: Configuration of the trial.
        encoder: The encoder to train, with the pretrained weights.
        head: The head.
        pretrained: The encoder before training.
        num_train: N, number of training images.
        class_weights: Weights of the classes in the loss, (C,); 1 by default.

    Raises:
        ConfigError: If the method cannot be imported, or cannot train this encoder; see
            :func:`check_method` and :func:`check_encoder`.
    """
    common = {"label_smoothing": config.training.label_smoothing, "class_weights": class_weights}
    scale = method_scale(config, num_train)
    parts = _Parts(config, encoder, head, pretrained, scale, common)
    return METHODS.get(config.method.name, _own)(parts)


def check_method(config: TrialConfig) -> list[str]:
    """Return a sentence for each reason for which a method cannot train as the settings say."""
    name = config.method.name
    problems: list[str] = []
    if name not in METHODS:
        try:
            own_class(name)
        except ConfigError as error:
            problems += error.problems
    if name in NEED_WHOLE_BATCH and config.training.accumulation_steps > 1:
        problems.append(
            f"method.name={name} needs all rows of a batch at once, but got "
            f"training.accumulation_steps={config.training.accumulation_steps}: set it to 1"
        )
    if name == "ldifs" and config.training.compile:
        problems.append(
            "method.name=ldifs reads features of inner layers, which training.compile=true hides: "
            "set training.compile=false"
        )
    return problems


def check_encoder(config: TrialConfig, encoder: nn.Module, image_size: int) -> list[str]:
    """Return a sentence if a method cannot train an encoder.

    Args:
        config: Configuration of the trial.
        encoder: The encoder, whose frozen parameters are frozen; on any device.
        image_size: S, side of the images in pixels.
    """
    if config.method.name == "ldifs":
        try:
            inner_layers(encoder, image_size)
        except ConfigError as error:
            return list(error.problems)
    if config.method.name == "bitfit":
        parameters = dict(encoder.named_parameters())
        if not any(parameters[name].requires_grad for name in bias_and_norm_parameters(encoder)):
            return [
                "method.name=bitfit trains biases and normalisation layers, but all of this "
                "backbone are frozen: lower backbone.frozen_layers, or set "
                "method.name=linear_probe"
            ]
    return []


def own_class(path: str) -> type[Method]:
    """Import the class of one's own method; this runs the code of its module.

    Args:
        path: Import path, such as ``my_package.MyMethod``.

    Raises:
        ConfigError: If it cannot be imported, or is no subclass of `Method`.
    """
    module, _, name = path.rpartition(".")
    try:
        found = pkgutil.resolve_name(f"{module}:{name}")
    except Exception as error:  # whatever the code of others raises
        raise ConfigError(
            f"method.name={path} cannot be imported ({type(error).__name__}: {error}): install its "
            "package, or name its folder in PYTHONPATH, on every machine that trains"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(
            f"method.name={path} is not a subclass of drtune_ray.method.Method: derive it from that"
        )
    return found


def _own(parts: _Parts) -> Method:
    method, frozen = own_class(parts.config.method.name), None
    if method.needs_pretrained_features:
        frozen = parts.pretrained.for_features()
    return method(parts.encoder, parts.head, frozen, **parts.common)


def _plain(method: type[Method], parts: _Parts) -> Method:
    return method(parts.encoder, parts.head, **parts.common)


def _penalised(*penalties: Callable[[_Parts], Penalty]) -> Callable[[_Parts], Method]:
    def build(parts: _Parts) -> Method:
        terms = [penalty(parts) for penalty in penalties]
        return CETuning(parts.encoder, parts.head, penalties=terms, **parts.common)

    return build


def _l2_sp(parts: _Parts) -> Penalty:
    settings = parts.config.method
    return L2SP(parts.encoder, settings.l2_sp_weight, settings.l2_sp_head_weight)


def _bss(parts: _Parts) -> Penalty:
    settings = parts.config.method
    return BatchSpectralShrinkage(settings.bss_weight, settings.bss_num_values)


def _ldifs(parts: _Parts) -> Method:
    copy, settings = parts.pretrained.copy(), parts.config.method
    layers = inner_layers(copy, parts.pretrained.backbone.image_size)
    return LDIFS(
        parts.encoder,
        parts.head,
        copy,
        layers=layers,
        weight=settings.ldifs_weight,
        **parts.common,
    )


def inner_layers(encoder: nn.Module, image_size: int) -> dict[str, int]:
    """Return at most `MAX_LAYERS` layers of an encoder, evenly spaced, and their channels.

    They are of the stages or blocks that timm names in `feature_info`.

    Raises:
        ConfigError: If timm names none, or their features are no single tensors.
    """
    named: Any = getattr(encoder, "feature_info", None) or []
    known = [(str(each["module"]), int(each["num_chs"])) for each in named]
    number = min(MAX_LAYERS, len(known))
    layers = dict(known[len(known) * (at + 1) // number - 1] for at in range(number))
    try:
        with torch.inference_mode(), captured(encoder, layers) as found:
            device = next(encoder.parameters()).device
            encoder.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
        for name, width in layers.items():
            channel_axis(found[name], width)
    except (AttributeError, KeyError, ValueError):
        layers = {}
    if not layers:
        raise ConfigError(
            "timm names no layers of this backbone whose features can be read: choose another "
            "backbone.name or method.name"
        )
    return layers


def _lp_ft(parts: _Parts) -> Method:
    probe_epochs = _probe_epochs(parts.config)
    return LPFT(parts.encoder, parts.head, probe_epochs=probe_epochs, **parts.common)


def _wise_ft(parts: _Parts) -> Method:
    return WiSEFT(
        parts.encoder,
        parts.head,
        parts.pretrained.copy(),
        probe_epochs=_probe_epochs(parts.config),
        **parts.common,
    )


def _spd(parts: _Parts) -> Method:
    weight = parts.config.method.spd_weight
    return SPD(parts.encoder, parts.head, weight=weight, **parts.common)


def _ftp(parts: _Parts) -> Method:
    annealing = parts.config.method.ftp_annealing
    return FTP(parts.encoder, parts.head, annealing=annealing, **parts.common)


def _scl(parts: _Parts) -> Method:
    settings = parts.config.method
    contrast = SupervisedContrast(settings.scl_weight, settings.scl_temperature)
    rest = 1.0 - settings.scl_weight
    return CETuning(
        parts.encoder,
        parts.head,
        penalties=[contrast],
        cross_entropy_weight=rest,
        **parts.common,
    )


def _probe_epochs(config: TrialConfig) -> int:
    epochs = config.training.epochs
    return min(max(1, round(config.method.probe_share * epochs)), epochs - 1)


def _dr_tune(*penalties: Callable[[_Parts], Penalty]) -> Callable[[_Parts], Method]:
    return partial(_with_bank, penalties=penalties, calibrates=True)


def _with_bank(
    parts: _Parts, *, penalties: tuple[Callable[[_Parts], Penalty], ...] = (), calibrates: bool
) -> Method:
    config, num_features = parts.config, parts.head.in_features
    return DRTune(
        parts.encoder,
        parts.head,
        FeatureBank(parts.scale.bank_size, num_features),
        _calibration(config, num_features) if calibrates else None,
        parts.pretrained.for_features(),
        regularization_weight=parts.scale.regularization_weight,
        reduction=config.method.reduction,
        penalties=[penalty(parts) for penalty in penalties],
        **parts.common,
    )


def _calibration(config: TrialConfig, num_features: int) -> SemanticCalibration:
    calibration = config.method.calibration
    return SemanticCalibration(
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
    )


METHODS: dict[str, Callable[[_Parts], Method]] = {
    "dr_tune": _dr_tune(),
    "ce_tuning": _penalised(),
    "dr": partial(_with_bank, calibrates=False),
    "dr_tune_l2_sp": _dr_tune(_l2_sp),
    "dr_tune_bss": _dr_tune(_bss),
    "linear_probe": partial(_plain, LinearProbe),
    "bitfit": partial(_plain, BitFit),
    "l2_sp": _penalised(_l2_sp),
    "bss": _penalised(_bss),
    "ldifs": _ldifs,
    "lp_ft": _lp_ft,
    "wise_ft": _wise_ft,
    "spd": _spd,
    "ftp": _ftp,
    "scl": _scl,
}
MAX_LAYERS = 5
NEED_WHOLE_BATCH = ("bss", "dr_tune_bss", "scl")
