"""Weights files as other programs write them: what is taken, what is said, what is refused."""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.errors import ConfigError
from drtune_ray.training import weights_loading
from drtune_ray.training.backbones import (
    Backbone,
    create_encoder,
    load_backbone,
    normalization_note,
)
from drtune_ray.training.checkpoint import read_checkpoint, write_checkpoint
from drtune_ray.training.weights_file import read_weights
from drtune_ray.training.weights_loading import KeyReport
from drtune_ray.training.weights_match import Target, matches

VIT, RESNET, SIDE = "test_vit", "test_resnet", 64
State = dict[str, Tensor]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture(autouse=True)
def few_variants(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Try one model alone for weights that do not fit: building them takes seconds."""
    if "variant" not in request.node.name:
        monkeypatch.setattr(weights_loading, "MAX_VARIANTS", 1)


def state_of(name: str, seed: int = 0, **options: Any) -> State:
    """State dict of a model with a classifier, other than that of another seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=5, **options)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    return dict(model.state_dict())


def behind(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(tmp_path: Path, content: Any, name: str = "weights.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def load(path: Path, name: str = RESNET, **settings: Any) -> tuple[Backbone, KeyReport]:
    config = BackboneConfig(name=name, weights=str(path), **settings)
    return load_backbone(config, settings.pop("side", SIDE))


def problem_of(path: Path, name: str = RESNET, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, name, **settings)
    return str(caught.value).removeprefix(f"backbone.weights={str(path)!r} ")


def assert_taken(backbone: Backbone, state: Mapping[str, Tensor], *but: str) -> None:
    """Every tensor of the encoder is the given one."""
    assert len(backbone.state) > 20
    for name, tensor in backbone.state.items():
        assert name in but or torch.equal(tensor, state[name]), name


# ---- prefixes


@pytest.mark.parametrize(
    "prefix",
    ["module.encoder_q.", "_orig_mod.module.", "model.backbone.", "student.0.net.", "a.b.c.d.e."],
)
def test_prefixes__are_taken_off_until_the_names_fit(tmp_path: Path, prefix: str) -> None:
    state = state_of(RESNET)
    path = saved(tmp_path, {"state_dict": behind(prefix, state), "epoch": 1})
    backbone, report = load(path)
    assert_taken(backbone, state)
    assert not report.is_by_order
    assert report.unused == (f"{prefix}fc.bias", f"{prefix}fc.weight")


@pytest.mark.parametrize("side", [SIDE, 160])
def test_prefixes__moco_v3_at_every_size(tmp_path: Path, side: int) -> None:
    base, momentum = state_of(VIT, 1), state_of(VIT, 2)
    both = behind("module.base_encoder.", base) | behind("module.momentum_encoder.", momentum)
    path = saved(tmp_path, {"arch": "vit", "state_dict": both})
    backbone, report = load_backbone(BackboneConfig(name=VIT, weights=str(path)), side)
    assert_taken(backbone, base, "pos_embed")
    assert backbone.state["pos_embed"].shape[1] == (side // 16) ** 2 + 1
    assert torch.equal(backbone.state["pos_embed"][:, 0], base["pos_embed"][:, 0])
    assert report.taken == "state_dict.module.base_encoder"
    assert report.others == ("state_dict.module.momentum_encoder",)
    assert (
        "; taken from state_dict.module.base_encoder, not from state_dict.module.momentum_encoder "
        "(backbone.weights_key=state_dict.module.momentum_encoder takes that instead)"
    ) in str(report)
    other = BackboneConfig(name=VIT, weights=str(path), weights_key=report.others[0])
    assert_taken(load_backbone(other, side)[0], momentum, "pos_embed")


# ---- which of several


def test_several__averaged_weights_are_taken(tmp_path: Path) -> None:
    state, average = state_of(RESNET, 1), state_of(RESNET, 2)
    path = saved(tmp_path, {"state_dict": state, "state_dict_ema": average})
    backbone, report = load(path)
    assert_taken(backbone, average)
    assert str(report).endswith(
        "; taken from state_dict_ema, not from state_dict (backbone.weights_key=state_dict takes "
        "that instead)"
    )
    backbone, report = load(path, weights_key="state_dict")
    assert_taken(backbone, state)
    assert report.others == ()


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_several__averaged_weights_alone(tmp_path: Path, key: str) -> None:
    state = state_of(RESNET)
    path = saved(tmp_path, {key: behind("module.", state), "epoch": 3})
    backbone, report = load(path)
    assert_taken(backbone, state)
    assert report.others == ()


def test_several__a_teacher_before_its_student(tmp_path: Path) -> None:
    student, teacher = state_of(RESNET, 1), state_of(RESNET, 2)
    content = {"student": behind("module.", student), "teacher": behind("backbone.", teacher)}
    backbone, report = load(saved(tmp_path, content))
    assert_taken(backbone, teacher)
    assert (report.taken, report.others) == ("teacher.backbone", ("student.module",))


def test_several__beside_tensors_in_no_mapping(tmp_path: Path) -> None:
    state, average = state_of(RESNET, 1), state_of(RESNET, 2)
    path = saved(tmp_path, state | {"ema": average})
    backbone, report = load(path)
    assert_taken(backbone, average)
    assert report.others == ("top-level",)
    assert_taken(load(path, weights_key="top-level")[0], state)


def test_several__half_an_average_is_not_preferred(tmp_path: Path) -> None:
    state = state_of(RESNET, 1)
    part = {name: tensor for name, tensor in state_of(RESNET, 2).items() if "running" not in name}
    backbone, report = load(saved(tmp_path, {"model": state, "model_ema": part}))
    assert_taken(backbone, state)
    assert report.others == ()


def test_weights_key__unknown(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": {"conv1.weight": torch.zeros(1)}, "ema": {}})
    with pytest.raises(ConfigError) as caught:
        load(path, weights_key="model")
    assert str(caught.value) == (
        f"backbone.weights_key='model' names no part of {str(path)!r}, which has tensors in "
        "['state_dict', 'state_dict.conv1']"
    )


def test_weights_key__without_a_file() -> None:
    with pytest.raises(ConfigError, match=r"^backbone\.weights_key='ema' names a part of a weigh"):
        load_backbone(BackboneConfig(name=RESNET, weights_key="ema"), SIDE)


# ---- by position


def position_layout(state: Mapping[str, Tensor]) -> State:
    """Other names for the modules, in the same order, as a layout of another library."""
    modules: dict[str, str] = {}
    renamed = {}
    for name, tensor in state.items():
        module, _, word = name.rpartition(".")
        modules.setdefault(module, f"net.{len(modules)}")
        renamed[f"{modules[module]}.{word}"] = tensor
    return renamed


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_order__modules_in_the_same_order(tmp_path: Path, name: str) -> None:
    state = state_of(name)
    backbone, report = load(saved(tmp_path, position_layout(state)), name)
    assert_taken(backbone, state, "pos_embed")
    assert report.is_by_order
    assert len(report.unused) == 2  # of the classifier


def test_order__a_batch_norm_keeps_its_weight_and_bias(tmp_path: Path) -> None:
    # Of equal shape: by position alone they would be swapped.
    state = state_of(RESNET)
    turned: State = {}
    layout = position_layout(state)
    for name in layout:
        module = name.rpartition(".")[0]
        of_module = [other for other in layout if other.rpartition(".")[0] == module]
        turned |= {other: layout[other] for other in reversed(of_module)}
    assert list(turned) != list(layout)
    backbone, report = load(saved(tmp_path, turned))
    assert_taken(backbone, state)
    assert report.is_by_order


def test_order__not_trusted_without_last_words(tmp_path: Path) -> None:
    layout = {f"layer{at:03d}": t for at, t in enumerate(state_of(RESNET).values())}
    assert problem_of(saved(tmp_path, layout)).startswith("fit 0% of 'test_resnet': its tensors ")


def test_order__not_trusted_where_last_words_differ(tmp_path: Path) -> None:
    layout = position_layout(state_of(RESNET))
    swapped = {
        n.replace(".weight", ".x").replace(".bias", ".weight").replace(".x", ".bias"): t
        for n, t in layout.items()
    }
    assert problem_of(saved(tmp_path, swapped)).startswith("fit 0% of 'test_resnet': its tensors ")


def test_order__alphabetical_order_is_not_trusted() -> None:
    # Twelve equal layers: sorted, as safetensors files are, layer 10 comes before layer 2.
    encoder = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(12)))
    layout = {f"net.{name}x": t for name, t in encoder.state_dict().items()}
    given = {name.replace("x", ""): t for name, t in sorted(layout.items())}
    renamed = {name.replace("net.", "block."): t for name, t in given.items()}
    target = Target(torch.nn.ModuleDict({"stem": encoder}))
    by_name = matches(target, {"": renamed})
    assert not any(match.is_by_order for match in by_name)
    in_order = {f"block.{n}": t for n, t in encoder.state_dict().items()}
    named = Target(torch.nn.ModuleDict({f"m{at}": layer for at, layer in enumerate(encoder)}))
    assert [match.is_by_order for match in matches(named, {"": in_order})] == [True]
    assert matches(named, {"": renamed}) == []


def test_order__names_that_are_known_are_not_overruled(tmp_path: Path) -> None:
    # Two blocks' names swapped: shapes and last words agree by position, the names do not.
    state = state_of(VIT)
    swapped = {}
    for name, tensor in state.items():
        there = {"0": "1", "1": "0"}.get(name.split(".")[1] if "blocks" in name else "")
        swapped[f"blocks.{there}.{name.split('.', 2)[2]}" if there else name] = tensor
    del swapped["norm.weight"]
    assert problem_of(saved(tmp_path, swapped), VIT).startswith("lacks 1 of the ")


# ---- what is missing


def test_missing__a_parameter_is_refused_unless_allowed(tmp_path: Path) -> None:
    state = state_of(VIT)
    del state["blocks.1.mlp.fc2.weight"]
    path = saved(tmp_path, behind("module.", state))
    assert problem_of(path, VIT) == (
        "lacks 1 of the 78 parameters of 'test_vit' (blocks.1.mlp.fc2.weight): name the backbone "
        "that the weights were made for, or set backbone.allow_missing=true to start these at "
        "random"
    )
    backbone, report = load(path, VIT, allow_missing=True)
    assert_taken(backbone, state_of(VIT), "blocks.1.mlp.fc2.weight", "pos_embed")
    assert report.missing == ("blocks.1.mlp.fc2.weight",)
    assert "1 tensor missing from the file (blocks.1.mlp.fc2.weight)" in str(report)


def test_missing__statistics_of_batch_norm_are_refused(tmp_path: Path) -> None:
    state = {n: t for n, t in state_of(RESNET).items() if "running_mean" not in n}
    assert "bn1.running_mean, " in problem_of(saved(tmp_path, state))


def test_missing__counters_of_batch_norm_are_not(tmp_path: Path) -> None:
    state = {n: t for n, t in state_of(RESNET).items() if "num_batches" not in n}
    backbone, _ = load(saved(tmp_path, state))
    assert_taken(backbone, state, *(n for n in backbone.state if "num_batches" in n))
    backbone, report = load(saved(tmp_path, position_layout(state)))
    assert report.is_by_order
    assert_taken(backbone, state, *(n for n in backbone.state if "num_batches" in n))


@pytest.mark.parametrize(
    ("given", "name", "says"),
    [
        ("resnet10t", "resnet14t", r"lacks \d+ of the \d+ .*: set backbone.name=resnet10t, which "),
        ("test_vit", "test_vit2", r"lacks \d+ of the \d+ .*: set backbone.name=test_vit, which "),
    ],
)
def test_missing__the_variant_that_fits_is_named(
    tmp_path: Path, given: str, name: str, says: str
) -> None:
    path = saved(tmp_path, {"model": behind("module.", state_of(given))})
    assert re.search(says, problem_of(path, name))


def test_missing__counters_that_became_fractions_are_not(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in state_of(RESNET).items()}
    assert load(saved(tmp_path, state))[1].missing == ()


def test_missing__integers_are_no_weights(tmp_path: Path) -> None:
    state = state_of(RESNET)
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to(torch.int8)
    assert "(layer1.0.conv1.weight" in problem_of(saved(tmp_path, state))


# ---- the first convolution


def test_first_convolution__one_channel_is_spread(tmp_path: Path) -> None:
    state = state_of(RESNET, in_chans=1)
    backbone, report = load(saved(tmp_path, behind("module.", state)))
    assert_taken(backbone, state, "conv1.0.weight")
    kernel = backbone.state["conv1.0.weight"]
    assert torch.allclose(kernel.sum(1, keepdim=True), state["conv1.0.weight"], atol=1e-6)
    assert torch.equal(kernel[:, 0], kernel[:, 1])
    assert report.spread == ("conv1.0.weight",)
    assert report.missing == ()
    assert "; the one channel of conv1.0.weight spread over three" in str(report)


def test_first_convolution__one_channel_of_a_transformer(tmp_path: Path) -> None:
    state = state_of(VIT, in_chans=1)
    backbone, report = load(saved(tmp_path, state), VIT)
    assert report.spread == ("patch_embed.proj.weight",)
    kernel = backbone.state["patch_embed.proj.weight"]
    assert torch.allclose(kernel.sum(1, keepdim=True), state["patch_embed.proj.weight"], atol=1e-6)


@pytest.mark.parametrize("allow_missing", [False, True])
def test_first_convolution__never_random(tmp_path: Path, allow_missing: bool) -> None:
    state = state_of(RESNET, in_chans=4)
    path = saved(tmp_path, state)
    assert problem_of(path, allow_missing=allow_missing) == (
        "lacks 1 of the 75 parameters of 'test_resnet' (conv1.0.weight: [16, 4, 3, 3] in the file, "
        "[16, 3, 3, 3] here): its first convolution must be there, for images of three channels or "
        "of one"
    )


# ---- formats


def in_timm_train(state: State) -> Any:
    args = argparse.Namespace(lr=0.1, nested=argparse.Namespace(path=pathlib.Path("x")))
    return {"epoch": 3, "arch": "x", "state_dict": state, "args": args, "metric": np.float64(77.2)}


def in_mae(state: State) -> Any:
    return {
        "model": state,
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
        "scaler": {"s": 1.0},
    }


def in_lightning(state: State) -> Any:
    return {
        "state_dict": behind("model.", state),
        "hyper_parameters": {"p": pathlib.Path("x"), "when": datetime.datetime(2024, 1, 1)},
    }


def with_random_states(state: State) -> Any:
    found: defaultdict[str, list[float]] = defaultdict(list)
    found["loss"].append(1.0)
    numbers = {"numpy": np.random.default_rng(0).random(3), "losses": found}
    return {"model": OrderedDict(state), "rng": numbers, "best": np.float32(1), "n": np.int64(2)}


def with_optimizer(state: State) -> Any:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "model_state_dict": state}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    "form", [in_timm_train, in_mae, in_lightning, with_random_states, with_optimizer]
)
def test_format__harmless_types_are_read(
    tmp_path: Path, form: Callable[[State], Any], is_zip: bool
) -> None:
    state, path = state_of(RESNET), tmp_path / "weights.ckpt"
    torch.save(form(state), path, _use_new_zipfile_serialization=is_zip)
    assert_taken(load(path)[0], state)


def test_format__content_of_harmless_types_is_not_kept(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)})
    assert set(read_weights(path).parts) == {"w"}


class Settings:
    """A class that no reader knows."""

    value = 1


class Attack:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return __import__("os").system, (self.command,)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_format__what_is_refused_is_named(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(
        {"model": state_of(RESNET), "args": Settings()}, path, _use_new_zipfile_serialization=is_zip
    )
    assert problem_of(path) == (
        "holds tests.training.test_weights.Settings, which is not read because it could run code: "
        "save the state_dict alone in a file"
    )


def test_format__no_code_runs(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": state_of(RESNET), "args": Attack(f"touch {tmp_path}/ran")})
    assert "system, which is not read because it could run code" in problem_of(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_format__a_whole_model(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "whole.pth"
    torch.save(timm.create_model(RESNET), path, _use_new_zipfile_serialization=is_zip)
    assert problem_of(path) == (
        "holds a whole model (timm.models.resnet.ResNet), not its state_dict: save "
        "model.state_dict() there"
    )


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_format__torchscript(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert problem_of(path).startswith("is a TorchScript archive, not a state dict: ")


@pytest.mark.parametrize("name", ["weights.bin", "weights.pth", "weights"])
def test_format__content_decides_not_the_suffix(tmp_path: Path, name: str) -> None:
    state = state_of(RESNET)
    safetensors.torch.save_file(state, tmp_path / name)
    assert_taken(load(tmp_path / name)[0], state)
    path = saved(tmp_path, state, "torch.safetensors")
    assert_taken(load(path)[0], state)


def cut_off(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])


def cut_off_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")


def torn_checkpoint(path: Path) -> None:
    write_checkpoint(path, {"model": {"encoder.a": torch.zeros(3)}})
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lfs_pointer, "is a Git LFS pointer, not the file itself: run git lfs pull in its "),
        (cut_off, "is a damaged safetensors file ("),
        (cut_off_torch, "is a PyTorch file that is cut off or damaged: download or copy it again"),
        (torn_checkpoint, "is a damaged checkpoint of drtune-ray: copy it again or give another "),
        (Path.touch, "is neither a safetensors nor a PyTorch weights file ("),
        (Path.mkdir, "is not a file: "),
        (
            lambda path: torch.save({"epoch": 3, "args": {}}, path),
            "holds no tensors, only the keys ",
        ),
        (lambda path: torch.save({}, path), "holds no tensors, only the keys []: save "),
    ],
)
def test_format__what_cannot_be_read(
    tmp_path: Path, write: Callable[[Path], Any], says: str
) -> None:
    write(tmp_path / "weights.pth")
    assert problem_of(tmp_path / "weights.pth").startswith(says)


def test_format__a_mapping_that_holds_itself(tmp_path: Path) -> None:
    state: dict[str, Any] = dict(state_of(RESNET))
    state["more"] = state
    assert_taken(load(saved(tmp_path, state))[0], state)


# ---- checkpoints of this package


def test_own_checkpoint__is_taken_with_its_normalization(tmp_path: Path) -> None:
    path, encoder = tmp_path / "best.ckpt", create_encoder(RESNET, SIDE).state_dict()
    model = behind("encoder.", encoder) | {"head.weight": torch.zeros(3, 4)}
    write_checkpoint(path, {"model": model, "record": {"epoch": 1}, "normalization": IMAGENET})
    backbone, report = load(path)
    assert_taken(backbone, encoder)
    assert report.unused == ("head.weight",)
    assert list(backbone.normalization.mean) == IMAGENET["mean"]
    assert list(backbone.normalization.std) == IMAGENET["std"]
    assert read_checkpoint(path)["model"].keys() == model.keys()  # as docs/weights.md opens it


# ---- normalization


def noted(path: Path, **settings: Any) -> str:
    config = BackboneConfig(name=VIT, weights=str(path), **settings)
    return normalization_note(config, *load_backbone(config, SIDE))


def test_normalization__of_timm_with_a_notice(tmp_path: Path) -> None:
    path = saved(tmp_path, state_of(VIT))
    expected = timm.get_pretrained_cfg(VIT)
    assert expected is not None
    assert load(path, VIT)[0].normalization.mean == tuple(expected.mean)
    assert noted(path) == (
        "normalization: mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5], timm's for test_vit.r160_in1k, "
        "since the file records none: set backbone.mean and backbone.std if it was trained with "
        "others"
    )


def test_normalization__recorded_as_timm_has_it(tmp_path: Path) -> None:
    """It was said that the file records none."""
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    path = saved(tmp_path, {"model": state_of(VIT), "normalization": half})
    assert noted(path) == (
        "normalization: mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5], as recorded in the file"
    )


def test_normalization__as_set(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": state_of(VIT), "normalization": {"mean": [0], "std": [1]}})
    backbone, _ = load(path, VIT, **IMAGENET)
    assert backbone.normalization.mean == (0.485, 0.456, 0.406)
    assert backbone.normalization.std == (0.229, 0.224, 0.225)
    assert noted(path, **IMAGENET) == (
        "normalization: mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225], as set"
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_normalization__as_recorded_in_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": state_of(VIT), "normalization": IMAGENET}, path)
    else:
        about = {"normalization": json.dumps(IMAGENET)}
        safetensors.torch.save_file(state_of(VIT), path, about)
    assert load(path, VIT)[0].normalization.mean == (0.485, 0.456, 0.406)
    assert noted(path).endswith("std [0.229, 0.224, 0.225], as recorded in the file")


@pytest.mark.parametrize(
    "recorded",
    ["batch", {}, {"mean": [0.5] * 3}, {"mean": [0.5] * 3, "std": [0, 1, 1]}]
    + [{"mean": ["a"] * 3, "std": [1] * 3}, {"mean": [float("nan")] * 3, "std": [1] * 3}],
)
def test_normalization__another_thing_of_that_name_is_ignored(
    tmp_path: Path, recorded: Any
) -> None:
    path = saved(tmp_path, {"model": state_of(VIT), "normalization": recorded})
    assert "timm's for test_vit" in noted(path)


def test_format__without_the_right_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))  # root has the right

    path = saved(tmp_path, {})
    monkeypatch.setattr(Path, "open", refused)
    assert problem_of(path) == (
        "cannot be read (Permission denied): give another file or the right to read it"
    )
