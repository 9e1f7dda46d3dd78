"""Accumulation, clipping, averages, freezing and skipped steps, each against its definition."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.method import DRTune, FeatureBank
from drtune_ray.training.accumulation import micro_batches
from drtune_ray.training.checkpoint import TrialFolder, read_checkpoint
from drtune_ray.training.compilation import compile_encoders
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.model import check_layers
from drtune_ray.training.trial import Trial
from tests.small import prepared, small_trial, small_values, write_coloured
from tests.training.tiny_nfnet import TINY_NFNET

CPU = torch.device("cpu")


class Made:
    """A trial in float64 and what it is made of."""

    def __init__(self, values: dict[str, Any], storage: Any) -> None:
        self.config = small_trial(values)
        self.data, self.backbone, _ = prepared(self.config, storage)
        self.trial = Trial(self.config, self.data, self.backbone, CPU)

    def weights(self) -> dict[str, torch.Tensor]:
        named = self.trial.method.named_parameters()
        return {name: value.detach().clone() for name, value in named}

    def gradients(self) -> dict[str, torch.Tensor]:
        named = self.trial.method.named_parameters()
        return {name: value.grad.clone() for name, value in named if value.grad is not None}


@pytest.fixture(scope="module")
def make(tmp_path_factory, weights_file):
    storage = tmp_path_factory.mktemp("storage")
    images = write_coloured(storage / "images")

    def made(backbone: str = TINY_NFNET, **changes: Any) -> Made:
        base = small_values(images, weights_file, backbone) | {
            "data.image_size": 16 if backbone == TINY_NFNET else 32,
            "training.precision": "float64",
            "optim.backbone_lr": 0.0005,
        }
        return Made(base | changes, storage)

    return made


# ---- accumulation


def test_parts_are_consecutive_and_as_even_as_they_can_be() -> None:
    batches = [list(range(8)), [8, 9, 10, 11, 12], [13]]
    parts, places = micro_batches(batches, 8, 3)
    assert parts == [[0, 1], [2, 3, 4], [5, 6, 7], [8, 9], [10, 11, 12], [13]]
    assert [(place.num_rows, place.is_last) for place in places] == [
        *((8, False), (8, False), (8, True), (5, False), (5, True), (1, True))
    ]
    assert micro_batches(batches, 8, 1)[0] == batches


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method.reduction": "mean", "method.bank_size": 5, "data.views": 0},
        {"method.name": "ce_tuning"},
    ],
)
def test_accumulated_gradients_are_those_of_the_large_batch(make, changes) -> None:
    whole, cut = (make(**changes, **{"training.accumulation_steps": n}) for n in (1, 3))
    refreshed: list[Any] = []
    if hasattr(cut.trial.method, "bank"):
        cut.trial.method.calibration.register_forward_hook(lambda *call: refreshed.append(1))
    runs = []
    for made in (whole, cut):
        found = []
        made.trial.warm_up_bank()
        for _ in range(2):
            for is_finite in made.trial.steps():
                assert is_finite
                bank = made.trial.method.bank.rows() if hasattr(made.trial.method, "bank") else ()
                found.append([made.trial.pending[-1], *made.gradients().values(), *bank])
            made.trial.finish_epoch()
        runs.append([*found, list(made.weights().values())])
    assert len(runs[0]) == len(runs[1]) == 9
    for wanted, found in zip(*runs, strict=True):
        for one, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)
    assert len(refreshed) == (0 if "method.name" in changes else 8)  # once an optimiser step


def test_only_a_part_of_the_batch_runs_at_once(make) -> None:
    trial = make(**{"training.accumulation_steps": 3}).trial
    seen: list[int] = []
    trial.method.downstream_encoder.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    list(trial.steps())
    assert seen == [2, 3, 3] * 3 + [3, 3]


# ---- clipping


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_a_gradient_longer_than_the_limit_is_scaled_to_it(make, share) -> None:
    free = make()
    next(free.trial.steps())
    wanted = free.gradients()
    length = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    clipped = make(**{"optim.clip_norm": share * length})
    next(clipped.trial.steps())
    found = clipped.gradients()
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, min(share, 1.0) * wanted[name], rtol=1e-4, atol=1e-12)


# ---- the average of the weights


def test_the_average_follows_its_recurrence_and_is_what_is_validated(make) -> None:
    decay = 0.75
    made = make(**{"training.ema_decay": decay})
    average: dict[str, torch.Tensor] = {}
    for _ in made.trial.steps():
        weights = made.weights()
        average = {
            name: decay * average[name] + (1 - decay) * value if average else value
            for name, value in weights.items()
        }
    kept = made.trial.average
    for prefix, module in (("downstream_encoder", kept.encoder), ("head", kept.head)):
        for name, value in module.named_parameters():
            torch.testing.assert_close(
                value.detach(), average[f"{prefix}.{name}"], rtol=1e-12, atol=0
            )
            assert not value.requires_grad
    (batch,) = made.data.validation_batches([list(range(len(made.data.validation)))])
    with torch.inference_mode():
        logits = kept.head(kept.encoder(made.trial.normalizer(batch[0])))
        trained = made.trial.method.eval()
        others = trained.head(trained.downstream_encoder(made.trial.normalizer(batch[0])))
    loss = made.trial._validate()["val_loss"]
    assert loss == pytest.approx(float(F.cross_entropy(logits, batch[1])), rel=1e-9)
    assert loss != pytest.approx(float(F.cross_entropy(others, batch[1])), rel=1e-6)


def test_the_average_is_kept_and_resumed_bit_for_bit(make, tmp_path) -> None:
    made = make(**{"training.ema_decay": 0.9, "training.epochs": 2, "optim.clip_norm": 0.5})

    def run(folder: TrialFolder, num_events: int | None, resume: Any = None) -> None:
        events = train_epochs(
            *(made.config, made.data, made.backbone),
            resume=resume,
            num_threads=1,
            save_requested=lambda: num_events is not None,
        )
        for at, event in enumerate(events, 1):
            event.save(folder)
            if at == num_events:
                return

    unbroken, broken = TrialFolder(tmp_path / "unbroken"), TrialFolder(tmp_path / "broken")
    run(unbroken, None)
    run(broken, 2)  # within the first epoch
    run(broken, None, broken.newest())
    states = [folder.newest() for folder in (broken, unbroken)]
    assert states[1]["average"].keys() == states[0]["average"].keys()
    for name, value in states[1]["average"].items():
        assert torch.equal(states[0]["average"][name], value), name
    for name, value in states[1]["method"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(states[0]["method"][name], value), name
    best = read_checkpoint(unbroken.best)
    if best["record"]["epoch"] == 2:
        for name, value in best["model"].items():
            assert torch.equal(states[1]["average"][f"module.{name}"], value), name
    assert any(
        not torch.equal(value, states[1]["method"][f"downstream_{name}"])
        for name, value in best["model"].items()
        if name.startswith("encoder.")
    )


# ---- freezing


@pytest.mark.parametrize(
    ("changes", "prefixes"),
    [
        ({"backbone.frozen_layers": 1}, ("conv_stem.", "bn1.")),
        ({"backbone.frozen_layers": 2}, ("conv_stem.", "bn1.", "blocks.0.")),
        ({"backbone.frozen_patterns": ["blocks.1.*", "*.bn3.bias"]}, ("blocks.1.",)),
        ({"backbone.frozen_layers": "all"}, ("",)),
        ({"backbone.frozen_layers": 99}, ("",)),
    ],
)
def test_frozen_parameters_have_no_gradient_and_no_decay(make, changes, prefixes) -> None:
    made = make("test_efficientnet", **changes, **{"optim.weight_decay": 0.5})
    encoder = made.trial.method.downstream_encoder
    before, wanted = made.weights(), set()
    for name, _ in encoder.named_parameters():
        if name.startswith(prefixes) or (name.endswith("bn3.bias") and "patterns" in str(changes)):
            wanted.add(name)
    list(made.trial.steps())
    after, gradients = made.weights(), made.gradients()
    optimised = {id(p) for group in made.trial.optimizer.param_groups for p in group["params"]}
    for name, parameter in encoder.named_parameters():
        full = f"downstream_encoder.{name}"
        is_kept = torch.equal(before[full], after[full])
        assert (name in wanted) == is_kept == (full not in gradients), name
        assert (name in wanted) == (id(parameter) not in optimised), name
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert not encoder.conv_stem.training or "patterns" in str(changes)


def test_a_frozen_layer_computes_what_the_pretrained_one_does(make) -> None:
    changes = {"backbone.frozen_layers": 2, "training.batch_norm": "local"}
    made = make("test_efficientnet", **changes)
    list(made.trial.steps())
    encoder = made.trial.method.downstream_encoder
    frozen = [m for m in encoder.blocks[0].modules() if isinstance(m, nn.BatchNorm2d)]
    trained = [m for m in encoder.blocks[1].modules() if isinstance(m, nn.BatchNorm2d)]
    assert frozen and trained
    assert {m.training for m in (encoder.bn1, *frozen)} == {False}
    assert {m.training for m in trained} == {True}
    pretrained = made.backbone.build().double().eval()
    for name, value in encoder.state_dict().items():
        if name.startswith(("conv_stem.", "bn1.", "blocks.0.")):
            assert torch.equal(value, pretrained.state_dict()[name].to(value)), name


def test_a_pattern_that_fits_nothing_is_refused(make) -> None:
    made = make("test_efficientnet")
    changed = made.config.with_values({"backbone.frozen_patterns": ["blocks.0.*", "layer1.*"]})
    (problem,) = check_layers(changed, made.backbone)
    assert "'layer1.*', which fits no parameter" in problem and "conv_stem.weight" in problem
    with pytest.raises(ConfigError, match="layer1"):
        Trial(changed, made.data, made.backbone, CPU)


# ---- skipped steps


def test_a_step_whose_gradients_overflow_leaves_all_but_the_scale_alone(make) -> None:
    made = make(**{"training.ema_decay": 0.5, "optim.clip_norm": 1.0})
    trial = made.trial
    trial.updater.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
    trial.method.enqueues = False  # as a trial with a scaler sets it
    trial.warm_up_bank()
    steps = trial.steps()
    next(steps)

    def state() -> list[torch.Tensor]:
        rate = torch.tensor(trial.schedule.get_last_lr())
        average = [*trial.average.encoder.parameters(), *trial.average.head.parameters()]
        values = [*trial.method.bank.rows(), *made.weights().values(), *average, rate]
        return [value.detach().clone() for value in values]

    before = state()
    weight = trial.method.head.weight
    overflow = weight.register_hook(lambda gradient: gradient * math.inf)
    assert next(steps) is True
    overflow.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert trial.updater.scaler.get_scale() == 512.0 and trial.progress.steps_done == 2
    newest = trial.method.bank.rows()[1][-1]
    assert next(steps) is True
    assert not any(torch.equal(a, b) for a, b in zip(before[-3:], state()[-3:], strict=True))
    assert not torch.equal(newest, trial.method.bank.rows()[1][-1])
    assert trial.updater.scaler.get_scale() == 512.0


def test_a_scaled_step_is_the_plain_one(make) -> None:
    plain, scaled = make(**{"optim.clip_norm": 0.1}), make(**{"optim.clip_norm": 0.1})
    scaled.trial.updater.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
    scaled.trial.method.enqueues = False
    for made in (plain, scaled):
        made.trial.warm_up_bank()
        list(made.trial.steps())
    for name, value in plain.weights().items():
        torch.testing.assert_close(scaled.weights()[name], value, rtol=1e-9, atol=1e-12)
    for one, other in zip(
        plain.trial.method.bank.rows(), scaled.trial.method.bank.rows(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


# ---- compiled encoders


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_encoders_compute_what_the_plain_ones_do() -> None:
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    found = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        trained, frozen = (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)) for _ in range(2))
        method = DRTune(trained, nn.Linear(5, 3), FeatureBank(8, 5), None, frozen)
        plain = list(method.state_dict())
        if is_compiled:
            compile_encoders(method, CPU)
        assert [e._compiled_call_impl is not None for e in (trained, frozen)] == [is_compiled] * 2
        assert list(method.state_dict()) == plain
        method.warm_up(images, labels)
        method(images, labels).loss.backward()
        gradients = [p.grad for p in method.parameters() if p.grad is not None]
        found.append([*gradients, *method.bank.rows()[:2]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)


def test_compiling_without_a_compiler_is_a_fault_of_the_machine(make, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentProblem, match=r"none of \['no-such-compiler'\]"):
        make(**{"training.compile": True})
