"""What is shown of weights files and backbones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner

from drtune_ray.cli import cli
from drtune_ray.config.demo_weights import DEMO_BACKBONE
from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.display.weights import HEADER, backbone_line, weights_lines
from drtune_ray.training.backbone_list import BackboneFacts, backbone_facts, backbone_names
from drtune_ray.training.weights_check import check_weights


def vit_file(tmp_path: Path, **changes: torch.Tensor) -> Path:
    state = dict(timm.create_model("test_vit", num_classes=7).state_dict())
    content = {f"module.{name}": tensor for name, tensor in {**state, **changes}.items()}
    torch.save({"state_dict": content}, tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def shown(path: Path, name: str = "test_vit", size: int = 96) -> list[str]:
    return list(weights_lines(check_weights(BackboneConfig(name=name, weights=str(path)), size)))


def test_check__of_a_file_that_fits(tmp_path: Path) -> None:
    path = vit_file(tmp_path, extra=torch.zeros(2))
    *lines, normalization = shown(path)
    assert lines == [
        f"{path}: names of timm",
        "wrapped in: DataParallel or DistributedDataParallel",
        "test_vit at 96 pixels: 78 tensors matched by name, 100.0% of the encoder",
        "head dropped: 2 (module.head.bias, module.head.weight)",
        "unexpected: 1 (module.extra)",
        "resized to the image size: 1 (pos_embed)",
    ]
    assert normalization.startswith("normalization: mean [0.5, 0.5, 0.5]")


def test_check__of_a_file_that_does_not(tmp_path: Path) -> None:
    path = vit_file(tmp_path, **{"norm.weight": torch.zeros(65)})
    assert "missing: 1 (norm.weight)" in shown(path)
    assert "wrong shape: 1 (norm.weight: [65] in the file, [64] here)" in shown(path)
    lines = shown(path, "test_resnet", 64)
    assert lines[0] == f"{path}: unknown names"
    assert "test_resnet at 64 pixels: 0 tensors matched by name, 0.0% of the encoder" in lines
    assert any(line.startswith("unexpected: 78 (state_dict.module.") for line in lines)


def test_check__matched_by_position_is_said_loudly(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    torch.save(
        {
            f"unit{modules.index(name.rpartition('.')[0]):03d}.{name.rpartition('.')[2]}": tensor
            for name, tensor in state.items()
        },
        tmp_path / "renamed.pth",
    )
    lines = shown(tmp_path / "renamed.pth", "test_resnet", 64)
    assert "WARNING: matched by position ALONE, because the names in the file are unknown" in lines


@pytest.mark.parametrize("is_refused", [False, True])
def test_command__json_and_exit_code(tmp_path: Path, is_refused: bool) -> None:
    changes = {"norm.weight": torch.zeros(65)} if is_refused else {}
    path = vit_file(tmp_path, **changes)
    command = ["weights", "check", str(path), "--backbone", "test_vit", "--json"]
    done = CliRunner().invoke(cli, command)
    found = json.loads(done.stdout)
    assert (found["kind"], found["backbone"], found["image_size"]) == (
        "weights_check",
        "test_vit",
        160,
    )
    assert found["report"]["num_matched"] == 78 - is_refused
    assert found["report"]["missing"] == ["norm.weight"] * is_refused
    assert bool(found["problem"]) == bool(done.exception) == is_refused
    if is_refused:
        assert str(done.exception) == found["problem"]


# ---- backbones


def test_backbones__counts_of_a_model_by_hand() -> None:
    facts = backbone_facts("test_vit")
    model = timm.create_model("test_vit", num_classes=0)
    assert facts.num_parameters == sum(p.numel() for p in model.parameters())
    assert (facts.image_size, facts.num_features) == (160, 64)
    # 101 tokens, width 64, an MLP of 192 and 6 blocks; attention of 2 * 101 * 101 * 64 in each.
    tokens, width = 101, 64
    hidden = model.blocks[0].mlp.fc1.out_features
    block = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
    patches = 100 * width * 3 * 16**2
    assert facts.gmacs == pytest.approx((len(model.blocks) * block + patches) / 1e9, rel=0.01)


def test_backbones__weights_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backbone_facts("test_resnet").weights == ("hub",)
    assert backbone_facts("ghostnet_050").weights == ()
    name = "drtune_ray.training.backbone_list.is_cached"
    monkeypatch.setattr(name, lambda repository: repository == "timm/test_resnet.r160_in1k")
    assert backbone_facts("test_resnet").weights == ("r160_in1k",)
    monkeypatch.setattr("drtune_ray.training.backbone_list.has_demo_weights", lambda: True)
    assert backbone_facts(DEMO_BACKBONE).weights == ("demo",)


def test_backbones__lines() -> None:
    facts = BackboneFacts("resnet50", 224, 23_508_032, 2048, 4.0894, ("a1_in1k", "demo"))
    assert HEADER.split() == ["name", "size", "parameters", "D", "GMACs", "weights"]
    assert backbone_line(facts).split() == (
        ["resnet50", "224", "23.5", "M", "2048", "4.09", "a1_in1k,", "demo"]
    )
    unknown = BackboneFacts("odd", 224, 1, None, None, ())
    assert backbone_line(unknown).split() == ["odd", "224", "0.0", "M", "-", "-", "none"]
    broken = BackboneFacts("odd", 224, 0, None, None, (), "no such layer")
    assert backbone_line(broken).endswith("cannot be built: no such layer")


def test_backbones__command() -> None:
    lines = CliRunner().invoke(cli, ["backbones", "test_v*", "--json"]).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert [each["name"] for each in found] == backbone_names("test_v*")
    assert {each["kind"] for each in found} == {"backbone"}
    text = CliRunner().invoke(cli, ["backbones", "test_resnet"]).stdout.splitlines()
    assert [line.split()[0] for line in text] == ["name", "test_resnet"]
    names = json.loads(CliRunner().invoke(cli, ["backbones", "--json"]).stdout)
    assert names["kind"] == "backbones"
    assert len(names["names"]) > 1000
