"""Layouts of weights files: told by their keys, and their tensors where they belong.

tests/training/layouts holds the keys and shapes of a small member of each, with their source.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from torch import Tensor, nn

from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.config.weights_formats import WeightsFormat
from drtune_ray.errors import ConfigError
from drtune_ray.training.backbones import Backbone, create_encoder, load_backbone
from drtune_ray.training.weights_layouts import FORMATS, recognized
from drtune_ray.training.weights_loading import KeyReport

FOLDER = Path(__file__).parent / "layouts"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Of the blocks that are alike, the tests load the first ones.
DEEP = re.compile(r"blocks\.(\d{2}|[2-9])\.|encoderblock_(\d{2}|[2-9])/|layer[1-4]\.1\.")
UNREAD = ("queue", "token_embedding.weight", "lm_head.weight")
# Without a file of keys: those of installed packages, built by the tests themselves.
OF_PACKAGES = {"timm", "torchvision", "torchvision_vit", "efficientnet_pytorch"}
State = dict[str, Tensor]


def layout_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return found


def expanded(pattern: str) -> list[str]:
    """Names for a pattern with alternatives {a,b} and ranges {0..11}, as a shell expands them."""
    parts = re.split(r"\{(.*?)\}", pattern)
    for at in range(1, len(parts), 2):
        if found := re.fullmatch(r"(\d+)\.\.(\d+)", parts[at]):
            parts[at] = ",".join(map(str, range(int(found[1]), int(found[2]) + 1)))
    choices = (part.split(",") if at % 2 else [part] for at, part in enumerate(parts))
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def shapes_of(layout: dict[str, Any]) -> dict[str, list[int]]:
    shapes = {n: shape for pattern, shape in layout["keys"].items() for n in expanded(pattern)}
    for trunk, places in layout.get("trunks", {}).items():
        inner = shapes_of(layout_of(f"trunks/{trunk}"))
        shapes |= {f"{place}.{name}": shape for place in places for name, shape in inner.items()}
    return shapes


def tensors_of(layout: dict[str, Any]) -> State:
    """Random tensors of a shallow model, each of its own."""
    drawn = torch.Generator().manual_seed(0)
    return {
        name: _drawn(name, shape, drawn, half=layout.get("half", False))
        for name, shape in shapes_of(layout).items()
        if not DEEP.search(name)
    }


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build timm's transformers with two blocks, and ResNet-18 with one in each stage."""
    create = timm.create_model

    def create_shallow(name: str, **options: Any) -> nn.Module:
        if "resnet18" in name:
            options["layers"] = (1, 1, 1, 1)
        elif "patch" in name:
            options["depth"] = 2
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_shallow)


def _drawn(name: str, shape: list[int], drawn: torch.Generator, *, half: bool) -> Tensor:
    if name.endswith(UNREAD):
        return torch.zeros(shape)
    if name.endswith(("num_batches_tracked", "queue_ptr", "queue_index", "position_index")):
        return torch.zeros(shape, dtype=torch.int64)
    tensor = torch.randn(shape, generator=drawn) * 0.05
    if name.endswith(("running_var", "norm.weight", "scale", "bn1.weight", "bn2.weight")):
        tensor = tensor.abs() + 0.5
    return tensor.half() if half else tensor


def written(tmp_path: Path, layout: dict[str, Any], tensors: State) -> Path:
    if layout.get("numpy"):
        np.savez(tmp_path / "weights.npz", **{n: t.numpy() for n, t in tensors.items()})
        return tmp_path / "weights.npz"
    content: dict[str, Any] = {key: {} for key in layout["containers"]}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if first in layout["containers"]:
            content[first][rest] = tensor
        else:
            content[name] = tensor
    torch.save(content | {"epoch": 3}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


# ---- the same tensors under timm's names, by the definition of each layout


def below(place: str, tensors: State) -> State:
    start = f"{place}." if place else ""
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def of_clip(tensors: State) -> State:
    own = below("visual", tensors)
    state = {
        "cls_token": own["class_embedding"][None, None],
        "pos_embed": own["positional_embedding"][None],
        "patch_embed.proj.weight": own["conv1.weight"],
    }
    for word in ("weight", "bias"):
        state |= {f"norm_pre.{word}": own[f"ln_pre.{word}"], f"norm.{word}": own[f"ln_post.{word}"]}
        for at in range(2):
            theirs, ours = f"transformer.resblocks.{at}", f"blocks.{at}"
            state |= {
                f"{ours}.norm1.{word}": own[f"{theirs}.ln_1.{word}"],
                f"{ours}.norm2.{word}": own[f"{theirs}.ln_2.{word}"],
                f"{ours}.attn.qkv.{word}": own[f"{theirs}.attn.in_proj_{word}"],
                f"{ours}.attn.proj.{word}": own[f"{theirs}.attn.out_proj.{word}"],
                f"{ours}.mlp.fc1.{word}": own[f"{theirs}.mlp.c_fc.{word}"],
                f"{ours}.mlp.fc2.{word}": own[f"{theirs}.mlp.c_proj.{word}"],
            }
    return state


def of_dinov3(tensors: State) -> State:
    renamed = {
        re.sub(r"ls([12])\.gamma", r"gamma_\1", name).replace("storage_tokens", "reg_token"): tensor
        for name, tensor in tensors.items()
    }
    # This member's bias of queries, keys and values is none.
    return {n: t for n, t in renamed.items() if not n.endswith(("qkv.bias", "bias_mask"))}


def of_beit_pretraining(tensors: State) -> State:
    own = below("model", tensors)
    table = own["rel_pos_bias.relative_position_bias_table"]
    tables = {f"blocks.{at}.attn.relative_position_bias_table": table for at in range(2)}
    return own | tables | {f"fc_norm.{word}": own[f"norm.{word}"] for word in ("weight", "bias")}


def flax_module(own: State, place: str, name: str) -> State:
    """A Dense or LayerNorm: y = x K + b, with the kernel's inputs first."""
    kernel = own.get(f"{place}/kernel")
    weight = own[f"{place}/scale"] if kernel is None else kernel.T
    return {f"{name}.weight": weight, f"{name}.bias": own[f"{place}/bias"]}


def flax_attention(own: State, place: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights (out, in) and biases: kernels are (in, heads, width) and (heads, width, out)."""
    found = {}
    for part in ("query", "key", "value"):
        kernel, bias = own[f"{place}/{part}/kernel"], own[f"{place}/{part}/bias"]
        found[part] = (kernel.reshape(kernel.shape[0], -1).T, bias.reshape(-1))
    kernel = own[f"{place}/out/kernel"]
    found["out"] = (kernel.reshape(-1, kernel.shape[-1]).T, own[f"{place}/out/bias"])
    return found


def of_flax(own: State, second: int, attention: int, mlp: int) -> State:
    state = {
        "patch_embed.proj.weight": own["embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": own["embedding/bias"],
    } | flax_module(own, "Transformer/encoder_norm", "norm")
    for at in range(2):
        block, ours = f"Transformer/encoderblock_{at}", f"blocks.{at}"
        state |= flax_module(own, f"{block}/LayerNorm_0", f"{ours}.norm1")
        state |= flax_module(own, f"{block}/LayerNorm_{second}", f"{ours}.norm2")
        for dense in (0, 1):
            theirs = f"{block}/MlpBlock_{mlp}/Dense_{dense}"
            state |= flax_module(own, theirs, f"{ours}.mlp.fc{dense + 1}")
        parts = flax_attention(own, f"{block}/MultiHeadDotProductAttention_{attention}")
        for word, at_word in (("weight", 0), ("bias", 1)):
            three = [parts[part][at_word] for part in ("query", "key", "value")]
            state[f"{ours}.attn.qkv.{word}"] = torch.cat(three)
            state[f"{ours}.attn.proj.{word}"] = parts["out"][at_word]
    return state


def of_google(tensors: State) -> State:
    tokens = {
        "cls_token": tensors["cls"],
        "pos_embed": tensors["Transformer/posembed_input/pos_embedding"],
    }
    return of_flax(tensors, 2, 1, 3) | tokens


def of_siglip(tensors: State) -> State:
    own = {n.removeprefix("params/img/"): t for n, t in tensors.items()}
    head = "MAPHead_0"
    parts = flax_attention(own, f"{head}/MultiHeadDotProductAttention_0")
    state = {"pos_embed": own["pos_embedding"], "attn_pool.latent": own[f"{head}/probe"]}
    state |= flax_module(own, f"{head}/LayerNorm_0", "attn_pool.norm")
    for dense in (0, 1):
        state |= flax_module(
            own, f"{head}/MlpBlock_0/Dense_{dense}", f"attn_pool.mlp.fc{dense + 1}"
        )
    for word, at in (("weight", 0), ("bias", 1)):
        state[f"attn_pool.q.{word}"] = parts["query"][at]
        state[f"attn_pool.kv.{word}"] = torch.cat([parts["key"][at], parts["value"][at]])
        state[f"attn_pool.proj.{word}"] = parts["out"][at]
    return of_flax(own, 1, 0, 0) | state


BY_DEFINITION: dict[str, Callable[[State], State]] = {
    "clip": of_clip,
    "dinov3": of_dinov3,
    "beit_pretraining": of_beit_pretraining,
    "google_vit": of_google,
    "siglip": of_siglip,
}


def directly(layout: dict[str, Any], tensors: State) -> nn.Module:
    """The encoder with the same tensors, loaded without any code under test."""
    encoder = create_encoder(layout["backbone"], layout["image_size"])
    rename = BY_DEFINITION.get(layout["format"])
    state = rename(tensors) if rename else below(layout["taken"], tensors)
    wanted = encoder.state_dict()
    encoder.load_state_dict(
        {n: state[n].to(t.dtype) if n in state else t for n, t in wanted.items()}
    )
    assert {name for name, _ in encoder.named_parameters()} <= state.keys()
    return encoder.eval()


@torch.inference_mode()
def features(encoder: nn.Module, size: int) -> Tensor:
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    found: Tensor = encoder.eval()(image)
    return found


def load(path: Path, layout: dict[str, Any], **settings: Any) -> tuple[Backbone, KeyReport]:
    config = BackboneConfig(name=layout["backbone"], weights=str(path), **settings)
    return load_backbone(config, layout["image_size"])


@pytest.mark.parametrize("name", NAMES)
def test_layout__gives_the_features_of_the_same_tensors(tmp_path: Path, name: str) -> None:
    layout = layout_of(name)
    tensors = tensors_of(layout)
    for copy, original in layout.get("same", {}).items():  # one module under two names
        tensors |= {f"{copy}.{n}": t for n, t in below(original, tensors).items()}
    path = written(tmp_path, layout, tensors)
    backbone, report = load(path, layout)
    size = layout["image_size"]
    expected, found = features(directly(layout, tensors), size), features(backbone.build(), size)
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(found, expected)
    assert report.missing == ()
    assert not report.is_by_order
    assert (report.layout, report.role) == (FORMATS[layout["format"]].title, layout["role"])
    assert sorted(report.others) == sorted(layout["others"])
    for sibling in set(layout["others"]) - layout.get("same", {}).keys():
        other, _ = load(path, layout, weights_key=sibling)
        assert not torch.allclose(features(other.build(), size), expected)


@pytest.mark.parametrize("name", NAMES)
def test_layout__is_told_by_its_keys(name: str) -> None:
    layout = layout_of(name)
    shapes = {key: tuple(shape) for key, shape in shapes_of(layout).items()}
    assert recognized(shapes).name == layout["format"]
    assert (
        recognized({f"_orig_mod.module.{key}": s for key, s in shapes.items()}).name
        == (layout["format"])
    )
    assert re.fullmatch(r"[0-9a-f]{40}", layout["commit"])
    assert layout["repository"].count("/") == 1
    assert layout["files"]


def test_layout__each_format_has_its_keys() -> None:
    assert set(get_args(WeightsFormat)) == FORMATS.keys()
    assert {layout_of(name)["format"] for name in NAMES} == FORMATS.keys() - OF_PACKAGES


def test_layout__the_trunk_is_torchvisions() -> None:
    theirs = torchvision.models.resnet18().state_dict()
    found = {n: tuple(shape) for n, shape in shapes_of(layout_of("trunks/resnet18")).items()}
    assert found == {n: tuple(t.shape) for n, t in theirs.items() if not n.startswith("fc.")}


# ---- formats that installed packages write


def trained(model: nn.Module) -> nn.Module:
    """A model whose statistics are not those of the start."""
    drawn = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=drawn) + 0.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.copy_(torch.randn(tensor.shape, generator=drawn) * 0.1)
    return model.eval()


@torch.inference_mode()
def before_the_classifier(model: nn.Module, last: str, size: int) -> Tensor:
    found: list[Tensor] = []
    model.get_submodule(last).register_forward_pre_hook(lambda _, given: found.append(given[0]))
    features(model, size)
    return found[0]


@pytest.mark.parametrize(
    ("theirs", "last", "name", "title"),
    [
        ("resnet34", "fc", "resnet34", ""),
        ("densenet121", "classifier", "densenet121", ""),
        ("mobilenet_v2", "classifier.1", "mobilenetv2_100", "torchvision"),
        ("efficientnet_b0", "classifier.1", "efficientnet_b0", "torchvision"),
    ],
)
def test_torchvision__gives_its_own_features(
    tmp_path: Path, theirs: str, last: str, name: str, title: str
) -> None:
    model = trained(getattr(torchvision.models, theirs)())
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone, report = load(tmp_path / "weights.pth", {"backbone": name, "image_size": 64})
    expected = before_the_classifier(model, last, 64)
    assert torch.allclose(features(backbone.build(), 64), expected, atol=1e-5)
    assert report.layout == title
    assert report.is_by_order == bool(title)
    assert "ALONE" not in str(report)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_torchvision__vision_transformer(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    own = torchvision.models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768
    )
    model = trained(own)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    layout = {"backbone": "vit_tiny_patch16_224", "image_size": 224}
    backbone, report = load(tmp_path / "weights.pth", layout)
    expected = before_the_classifier(model, "heads.head", 224)
    assert torch.allclose(features(backbone.build(), 224), expected, atol=1e-5)
    assert report.layout == "ViT of torchvision"
    assert report.head == (f"{prefix}heads.head.bias", f"{prefix}heads.head.weight")
    assert report.unexpected == ()
    small, report = load(tmp_path / "weights.pth", layout | {"image_size": 96})
    assert report.resized == ("pos_embed",)
    assert "; 1 tensor resized to the image size (pos_embed)" in str(report)
    assert small.state["pos_embed"].shape == (1, 37, 192)


# ---- the setting


def test_weights_format__overrules_the_keys(tmp_path: Path) -> None:
    layout = layout_of("dino")
    path = written(tmp_path, layout, tensors_of(layout))
    _, report = load(path, layout, weights_format="timm")
    assert (report.layout, report.role) == ("", "")
    assert report.taken == "teacher.backbone"  # an average still goes first
    _, report = load(path, layout, weights_format="ibot")
    assert (report.layout, report.role) == ("iBOT", "teacher")


def test_weights_format__of_another_layout_is_refused(tmp_path: Path) -> None:
    layout = layout_of("dino")
    path = written(tmp_path, layout, tensors_of(layout))
    with pytest.raises(ConfigError) as caught:
        load(path, layout, weights_format="moco_v2")
    assert str(caught.value) == (
        "backbone.weights_format=moco_v2 needs an encoder at ['encoder_q', 'encoder_k'], but "
        f"backbone.weights={str(path)!r} has none there that fits 'vit_tiny_patch16_224': its "
        "tensors begin ['student.module.backbone.blocks.0.attn.proj.bias', "
        "'student.module.backbone.blocks.0.attn.proj.weight', "
        "'student.module.backbone.blocks.0.attn.qkv.bias']; remove the setting or name the right "
        "layout"
    )


def test_weights_format__without_a_file() -> None:
    with pytest.raises(ConfigError, match=r"^backbone\.weights_format=dino is the layout of a wei"):
        load_backbone(BackboneConfig(name="test_resnet", weights_format="dino"), 64)


# ---- wrappers


def wrapped(state: State, kind: str) -> dict[str, Any]:
    names = {"compiled": "_orig_mod.", "both": "module._orig_mod.", "averaged": "module."}
    inner = {names.get(kind, "module.") + name: tensor for name, tensor in state.items()}
    if kind == "lightning":
        inner = {f"model.{name}": tensor for name, tensor in state.items()}
        return {"state_dict": inner, "pytorch-lightning_version": "2.4.0", "epoch": 1}
    if kind == "ema":
        return {"state_dict": inner, "state_dict_ema": inner}
    return inner | ({"n_averaged": torch.tensor(3)} if kind == "averaged" else {})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("parallel", ("DataParallel or DistributedDataParallel",)),
        ("compiled", ("torch.compile",)),
        ("both", ("torch.compile", "DataParallel or DistributedDataParallel")),
        ("averaged", ("AveragedModel",)),
        ("lightning", ("Lightning",)),
        ("ema", ("DataParallel or DistributedDataParallel", "EMA")),
    ],
)
def test_wrappers__are_named(tmp_path: Path, kind: str, expected: tuple[str, ...]) -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    torch.save(wrapped(dict(model.state_dict()), kind), tmp_path / "weights.pth")
    backbone, report = load(tmp_path / "weights.pth", {"backbone": "test_resnet", "image_size": 64})
    assert report.wrappers == expected
    assert report.missing == ()
    assert torch.equal(backbone.state["conv1.0.weight"], model.state_dict()["conv1.0.weight"])


# ---- archives of NumPy arrays


def google_file(tmp_path: Path) -> tuple[Path, dict[str, Any], State]:
    layout = layout_of("google_vit")
    tensors = tensors_of(layout)
    return written(tmp_path, layout, tensors), layout, tensors


def refusal(path: Path, layout: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, layout)
    return str(caught.value).removeprefix(f"backbone.weights={str(path)!r} ")


def test_archive__of_another_model(tmp_path: Path) -> None:
    path, layout, _ = google_file(tmp_path)
    assert refusal(path, layout | {"backbone": "test_resnet", "image_size": 64}) == (
        "holds NumPy arrays, which timm reads for its ViT and BiT ResNets, not for "
        "'test_resnet': name the backbone that the weights were made for"
    )
    said = refusal(path, layout | {"backbone": "vit_small_patch16_224"})
    assert said.startswith("holds NumPy arrays that do not fit 'vit_small_patch16_22")


def test_archive__with_objects_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (tmp_path / "ran").touch, ()

    path = tmp_path / "weights.npz"
    np.savez(path, a=np.array([Attack()], dtype=object))
    assert refusal(path, {"backbone": "test_vit", "image_size": 64}).startswith(
        "is an archive of NumPy arrays that cannot be read ("
    )
    assert not (tmp_path / "ran").exists()
