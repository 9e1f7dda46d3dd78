"""A small member of timm's families: built, weights loaded, DR-Tune steps, saved, loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from drtune_ray.config.trial import TrialConfig
from drtune_ray.method.dr_tune import DRTune
from drtune_ray.training.backbones import create_encoder, load_backbone
from drtune_ray.training.checkpoint import read_checkpoint, write_checkpoint
from drtune_ray.training.model import (
    build_method,
    classifier,
    classifier_state,
    set_training_mode,
)

# Name and image size, the smallest that it takes: by timm's module.
FAMILIES = {
    "resnet": ("test_resnet", 32),
    "regnet": ("regnetx_002", 32),
    "byobnet": ("test_byobnet", 32),
    "efficientnet": ("test_efficientnet", 32),
    "mobilenetv3": ("mobilenetv3_small_050", 32),
    "convnext": ("test_convnext", 32),
    "nfnet": ("test_nfnet", 32),
    "mambaout": ("test_mambaout", 32),
    "vision_transformer": ("test_vit", 32),
    "deit": ("deit_tiny_distilled_patch16_224", 32),
    "edgenext": ("edgenext_xx_small", 32),
    "mobilevit": ("mobilevit_xxs", 64),
    "ghostnet": ("ghostnet_050", 32),
    "xcit": ("xcit_nano_12_p16_224", 32),
    "eva": ("eva02_tiny_patch14_224", 28),
    "starnet": ("starnet_s050", 32),
}
SLOW_FAMILIES = {
    "swin_transformer": ("swin_tiny_patch4_window7_224", 224),
    "maxxvit": ("maxvit_rmlp_pico_rw_256", 64),
    "mlp_mixer": ("gmlp_ti16_224", 224),
    "densenet": ("densenet121", 32),
    "metaformer": ("poolformer_s12", 32),
    "efficientvit_mit": ("efficientvit_b0", 32),
    "efficientvit_msra": ("efficientvit_m0", 224),
    "hrnet": ("hrnet_w18_small", 32),
    "fastvit": ("fastvit_t8", 32),
    "repvit": ("repvit_m0_9", 32),
    "pit": ("pit_ti_224", 224),
    "pvt_v2": ("pvt_v2_b0", 32),
    "cait": ("cait_xxs24_224", 32),
    "gcvit": ("gcvit_xxtiny", 224),
    "swiftformer": ("swiftformer_xs", 32),
    "inception_next": ("inception_next_atto", 32),
    "hgnet": ("hgnetv2_b0", 32),
    "dla": ("dla46x_c", 32),
    "resnetv2": ("resnetv2_18", 32),
    "rexnet": ("rexnet_100", 32),
    "res2net": ("res2net50_14w_8s", 32),
    "resnest": ("resnest14d", 32),
    "convit": ("convit_tiny", 32),
}
EVERY = {**FAMILIES, **SLOW_FAMILIES}


def parameters() -> list[object]:
    slow = [pytest.mark.slow]
    return [
        pytest.param(*member, marks=slow if family in SLOW_FAMILIES else [], id=family)
        for family, member in EVERY.items()
    ]


def trial_of(name: str, size: int, path: Path) -> TrialConfig:
    return TrialConfig.from_mapping(
        {
            "data": {"train": "images", "image_size": size},
            "backbone": {"name": name, "weights": str(path)},
            "method": {"bank_size": 4, "calibration": {"rotation_rank": 2}},
            "training": {"precision": "float32"},
        }
    )


def written(tmp_path: Path, name: str, size: int) -> Path:
    torch.save(create_encoder(name, size).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.filterwarnings("ignore")  # of the models' own code
@pytest.mark.parametrize(("name", "size"), parameters())
def test_family__two_steps_saved_and_loaded(tmp_path: Path, name: str, size: int) -> None:
    config = trial_of(name, size, written(tmp_path, name, size))
    backbone, report = load_backbone(config.backbone, size)
    assert (report.missing, report.is_by_order) == ((), False)
    method = build_method(config, backbone, 2, 8, live_features=True)
    assert isinstance(method, DRTune)
    set_training_mode(method, "frozen")
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1])
    for _ in range(2):  # the first fills the bank
        output = method(images, labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss.isfinite()
    assert output.parts["distribution_regularization"] > 0
    state = classifier_state(method.downstream_encoder, method.head)
    moved = [n for n, t in backbone.state.items() if not torch.equal(t, state[f"encoder.{n}"])]
    assert moved
    write_checkpoint(tmp_path / "best.ckpt", {"model": state})
    model = classifier(name, size, read_checkpoint(tmp_path / "best.ckpt")["model"])
    method.eval()
    with torch.inference_mode():
        expected = method.head(method.downstream_encoder(images))
        assert torch.allclose(model(images), expected, atol=1e-5)


def test_family__each_is_a_module_of_timm() -> None:
    for family, (name, _) in EVERY.items():
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        assert module == family
