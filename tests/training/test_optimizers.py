"""The optimisers of timm: which are offered, what they are given, and that they resume exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.optim import get_optimizer_info, list_optimizers
from torch import nn

from drtune_ray.config.optimizers import OPTIMIZERS, WITH_MOMENTUM, alternative_to
from drtune_ray.config.training import OptimConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.training import optim
from drtune_ray.training.optim import build_optimizer

OF_TIMM = [name for name in OPTIMIZERS if name not in ("sgd", "adamw")]
# Of timm 1.0.21 and later, while 1.0.20 is supported.
NEWER = {
    *("adamuon", "cadamp", "csgdp", "lambcd", "muon", "nadamuon", "nmuon", "novogradc"),
    *("novogradw", "rmsproptfw"),
}


def test_every_optimiser_of_timm_is_offered_or_refused_for_a_reason() -> None:
    for name in set(list_optimizers()) - NEWER:
        assert (name in OPTIMIZERS) != (alternative_to(name) is not None), name
    assert set(OPTIMIZERS) <= set(list_optimizers())
    assert not any(get_optimizer_info(name).second_order for name in OF_TIMM)


def test_those_with_momentum_are_known() -> None:
    wanted = {name for name in OPTIMIZERS if get_optimizer_info(name).has_momentum}
    assert wanted == WITH_MOMENTUM


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adahessian", "timm's optimiser 'adahessian' cannot train here"),
        ("kronw", "timm's optimiser 'kronw' cannot train here"),
        ("nadam", "choose 'nadamw'"),
        ("addamw", "there is no optimiser 'addamw': the nearest is 'adamw'"),
        (3, "optim.name=3 is not valid"),
    ],
)
def test_other_names_are_refused_before_anything_starts(name: Any, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        TrialConfig.from_mapping({"data": {"train": "images"}, "optim": {"name": name}})
    assert said in str(refused.value)


class Trained:
    """A small model and its optimiser."""

    def __init__(self, name: Any) -> None:
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        self.head = nn.Linear(4 * 16, 3)
        config = OptimConfig(name=name, backbone_lr=0.01, weight_decay=0.25, momentum=0.75)
        self.optimizer = build_optimizer(self.body, self.head, config, 2.0)

    def train(self, steps: range) -> Trained:
        for step in steps:
            images = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.head(self.body(images)).square().mean().backward()
            self.optimizer.step()
        return self

    def state(self) -> list[Any]:
        return copy.deepcopy([part.state_dict() for part in (self.body, self.head, self.optimizer)])

    def resume(self, state: list[Any]) -> Trained:
        for part, of_part in zip((self.body, self.head, self.optimizer), state, strict=True):
            part.load_state_dict(of_part)
        return self

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in (*self.body.parameters(), *self.head.parameters())]


@pytest.mark.parametrize("name", OF_TIMM)
def test_an_optimiser_of_timm_takes_the_groups_and_resumes_bit_for_bit(name: str) -> None:
    unbroken = Trained(name)
    groups = unbroken.optimizer.param_groups
    assert [(group["lr"], group["weight_decay"], group["name"]) for group in groups] == [
        (0.01, 0.25, "backbone"),
        (0.01, 0.0, "backbone"),
        (0.02, 0.25, "head"),
        (0.02, 0.0, "head"),
    ]
    if name in WITH_MOMENTUM:
        held = [groups[0].get(key) for key in ("momentum", "beta1", "betas")]
        assert 0.75 in (*held[:2], *(held[2] or ())), held
    before = unbroken.weights()
    unbroken.train(range(6))
    moved = [not torch.equal(a, b) for a, b in zip(before, unbroken.weights(), strict=True)]
    assert moved[0] and moved[4]  # the matrices
    state = Trained(name).train(range(3)).state()
    resumed = Trained(name).resume(state).train(range(3, 6))
    for found, wanted in zip(resumed.weights(), unbroken.weights(), strict=True):
        assert torch.isfinite(found).all()
        assert torch.equal(found, wanted)


def test_one_that_the_installed_timm_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*groups: Any, **options: Any) -> None:
        raise ValueError("Unknown optimizer: lamb")

    monkeypatch.setattr(optim, "create_optimizer_v2", lacking)
    with pytest.raises(ConfigError, match="install timm 1.0.20 or later"):
        Trained("lamb")
