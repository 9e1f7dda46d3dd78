from __future__ import annotations

import logging

import pytest
import timm
import torch
from torch import Tensor, nn

from drtune_ray.training.batch_norm_folding import folded

# test_resnet: plain BatchNorm and residual sums; the others: BatchNormAct2d, squeeze and excite.
FOLDABLE = ["test_efficientnet", "test_resnet", "test_byobnet"]


def with_statistics(name: str) -> nn.Module:
    """A tiny timm model whose BatchNorm layers have something to fold."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def num_batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gives_the_same_features_without_batch_norm(name: str, dtype: torch.dtype) -> None:
    """Folded in float32, as it is loaded, then moved to the trial's precision."""
    model = with_statistics(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = folded(model, 32)
    assert num_batch_norms(model) > 5 > num_batch_norms(frozen)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected, found = model.to(dtype)(images.to(dtype)), frozen.to(dtype)(images.to(dtype))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(model.state_dict()[key].float(), before[key].float()) for key in before)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.training


@pytest.mark.parametrize("name", FOLDABLE)
def test_folded_in_float64_it_is_equal_to_the_rounding_of_float64(name: str) -> None:
    model = with_statistics(name).double()
    frozen = folded(model, 32)
    assert num_batch_norms(model) > num_batch_norms(frozen)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, found = model(images), frozen(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["test_vit", "test_nfnet"])
def test_without_batch_norm_nothing_changes(name: str) -> None:
    model = timm.create_model(name, num_classes=0).eval()
    side = model.default_cfg["input_size"][-1]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(folded(model, side)(images), model(images))


class ReadTwice(nn.Module):
    """The convolution's output is read beside its BatchNorm too: it may not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        nn.init.constant_(self.norm.running_mean, 0.7)

    def forward(self, images: Tensor) -> Tensor:
        once = self.convolution(images)
        features: Tensor = (self.norm(once) + once.square()).mean((2, 3))
        return features


def test_what_cannot_be_folded_is_left_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = ReadTwice().eval()
    with caplog.at_level(logging.WARNING):
        frozen = folded(model, 16)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(frozen(images), model(images))
    assert "could not be folded" in caplog.text


class SharedBlock(nn.Module):
    """One convolution and BatchNorm, used twice, beside one that is used once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.shared, self.shared_norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.unnormed = nn.BatchNorm2d(4, track_running_stats=False)
        nn.init.constant_(self.shared_norm.running_mean, 0.7)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.first_norm(self.first(images))
        for _ in range(2):
            rows = self.shared_norm(self.shared(rows))
        features: Tensor = self.unnormed(rows).square().mean((2, 3))
        return features


def test_layers_that_are_used_twice_stay() -> None:
    model = SharedBlock().eval()
    frozen = folded(model, 16)
    assert num_batch_norms(frozen) == num_batch_norms(model) - 1
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), model(images), rtol=1e-4, atol=1e-5)
