"""The README's example of the method alone runs as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    (block,) = re.findall(
        r"<!-- A test runs this block.*?```python\n(.*?)```", README.read_text(), re.S
    )
    return str(block)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The tensors are tiny: threads would cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_method_alone__runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    colours = torch.randn(10, 3, 1, 1)
    labels = torch.arange(10).repeat(8)
    images = colours[labels] + 0.3 * torch.randn(80, 3, 4, 4)
    loader = list(zip(images.split(20), labels.split(20), strict=True)) * 30
    encoder = nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    names: dict[str, Any] = {"encoder": encoder, "loader": loader}
    exec(compile(example(), str(README), "exec"), names)
    said = capsys.readouterr().out
    assert "distribution_regularization" in said
    assert "semantic_drift" in said
    assert "rotation_angle" in said
    method = names["method"]
    assert len(method.bank) == 1024
    with torch.no_grad():
        logits = names["head"](encoder(images))
    assert (logits.argmax(1) == labels).double().mean() > 0.8


def test_the_method_alone__is_short() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 15
