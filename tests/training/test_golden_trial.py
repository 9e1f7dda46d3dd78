"""The whole of a trial against a plain loop that shares no code with training/ or method/.

The loop below is written from METHOD's recipe: one encoder of timm in float64, the slow reference
of the method (`tests.method.reference`), SGD and AdamW by hand. What both read alike are the pixels
of a view and the seeds. Rates by step, losses by part, validation, weights: all must be equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from drtune_ray.config.trial import TrialConfig
from drtune_ray.training.checkpoint import TrialFolder, read_checkpoint
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.model import generator
from drtune_ray.values import nested
from tests.method.reference import AUTHORS, PAPER, ReferenceCalibration, ReferenceDRTune
from tests.small import prepared, small_values, write_coloured

N, BATCH, EPOCHS, BANK, RATE, DECAY = 30, 8, 3, 19, 0.004, 0.05
# Names of test_vit's parameters that are no matrices of weights, beside biases and norms.
NOT_DECAYED = ("cls_token", "pos_embed", "reg_token")


@dataclass(frozen=True)
class Recipe:
    """A preset as docs/presets.md has it; numbers of these 30 images, not read from the package."""

    calibration: dict[str, Any] | None
    weight: float = 1.0
    reduction: str = "sum"
    head_multiplier: float = 1.0
    nesterov: bool = False
    by_epoch: bool = False
    drop_last: bool = False
    trains_batch_norm: bool = False
    optimizer: str = "sgd"


DEFAULT = PAPER | {
    "rotation_interval": 3,
    "rotation_solver": "randomized",
    "rotation_rank": 4,
    "rotation_shrinkage": 0.02,
    "normalize": True,
    "similarity": "cosine",
    "confidence_temperature": 0.1,
}
RATIO = BANK / BATCH
RECIPES = {
    "default": Recipe(DEFAULT),
    "paper": Recipe(PAPER, RATIO, head_multiplier=1 + RATIO, trains_batch_norm=True),
    "authors": Recipe(
        AUTHORS,
        RATIO,
        reduction="mean",
        head_multiplier=1 + RATIO,
        nesterov=True,
        by_epoch=True,
        drop_last=True,
        trains_batch_norm=True,
    ),
    "ce_tuning": Recipe(None, optimizer="adamw"),
}
COMMON = {
    "training.epochs": EPOCHS,
    "training.batch_size": BATCH,
    "training.precision": "float64",
    "method.bank_size": BANK,
    "optim.backbone_lr": RATE,
    "optim.weight_decay": DECAY,
    "seed": 5,
}
CHANGES: dict[str, dict[str, Any]] = {
    "default": {
        "method.calibration.rotation_interval": 3,
        "method.calibration.rotation_rank": 4,
    },
    "ce_tuning": {
        "method.name": "ce_tuning",
        "optim.name": "adamw",
        "data.image_size": 160,  # test_vit's own: its position embeddings stay as they are
    },
}
DATA = ("data.train", "data.image_size", "backbone.name", "backbone.weights")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, weights_file):
    """Train a preset; return its data, the events, the rates of each step and the last state."""
    storage = tmp_path_factory.mktemp("storage")
    images = write_coloured(storage / "images")

    def train(name: str, views: int) -> dict[str, Any]:
        backbone_name = "test_vit" if name == "ce_tuning" else "test_byobnet"
        file = weights_file(backbone_name)
        base = small_values(images, weights_file, backbone_name)
        values = {path: base[path] for path in DATA} | COMMON | CHANGES.get(name, {})
        preset = None if name == "ce_tuning" else name
        config = TrialConfig.from_mapping(nested(values | {"data.views": views}), preset=preset)
        data, backbone, _ = prepared(config, storage)
        rates: list[list[tuple[str, float]]] = []
        hook = register_optimizer_step_pre_hook(
            lambda optimizer, *_: rates.append(
                [(g["name"], g["lr"]) for g in optimizer.param_groups]
            )
        )
        folder = TrialFolder(storage / f"{name} {views}")
        try:
            for event in train_epochs(config, data, backbone, num_threads=1):
                event.save(folder)
        finally:
            hook.remove()
        return {
            "data": data,
            "history": event.history,
            "rates": [dict(step) for step in rates],
            "state": folder.newest(),
            "best": read_checkpoint(folder.best),
            "expected": PlainLoop(RECIPES[name], data, backbone_name, file).run(),
        }

    return train


class PlainLoop:
    """The recipe, step by step."""

    def __init__(self, recipe: Recipe, data: Any, name: str, weights: Any) -> None:
        self.recipe, self.data = recipe, data
        state = safetensors.torch.load_file(weights)

        def encoder() -> nn.Module:
            model = timm.create_model(name, num_classes=0)
            model.load_state_dict({key: state[key] for key in model.state_dict()})
            return model.double()

        self.encoder, self.frozen = encoder(), encoder().eval()
        expected = timm.get_pretrained_cfg(name)
        self.mean = torch.tensor(expected.mean, dtype=torch.float64).view(1, 3, 1, 1)
        self.std = torch.tensor(expected.std, dtype=torch.float64).view(1, 3, 1, 1)
        self.head = nn.Linear(self.encoder.num_features, 3)
        nn.init.normal_(self.head.weight, std=0.01, generator=generator(5, "head"))
        nn.init.zeros_(self.head.bias)
        self.head.double()
        self.named = {
            **{f"encoder.{key}": value for key, value in self.encoder.named_parameters()},
            **{f"head.{key}": value for key, value in self.head.named_parameters()},
        }
        self.memory: dict[str, Any] = {name: None for name in self.named}
        self.num_updates = 0
        calibration = recipe.calibration and ReferenceCalibration(**recipe.calibration)
        self.method = ReferenceDRTune(BANK, calibration, recipe.weight, recipe.reduction)

    def images(self, rows: list[int], view: int) -> tuple[Tensor, Tensor]:
        ((pixels, labels),) = self.data.training_batches([rows], view)
        return (pixels.double() / 255 - self.mean) / self.std, labels

    def batches(self, epoch: int, drop_last: bool) -> list[list[int]]:
        rows = torch.randperm(N, generator=generator(5, "order", epoch)).tolist()
        batches = [rows[at : at + BATCH] for at in range(0, N, BATCH)]
        return batches[:3] if drop_last else batches

    def view(self, epoch: int) -> int:
        return epoch % self.data.num_views if self.data.num_views else epoch

    def run(self) -> list[dict[str, Any]]:
        if self.recipe.calibration is not None:
            rows = sum(self.batches(-1, drop_last=False), [])[:BANK]
            for at in range(0, BANK, BATCH):
                images, labels = self.images(rows[at : at + BATCH], self.view(-1))
                with torch.no_grad():
                    features = self.frozen(images)
                self.method.enqueue(features, features, labels)
        return [self.epoch(epoch) for epoch in range(EPOCHS)]

    def epoch(self, epoch: int) -> dict[str, Any]:
        if self.method.calibration is not None:
            self.method.calibration.begin_epoch()
        batches = self.batches(epoch, self.recipe.drop_last)
        steps, num_correct = [], 0
        for at, rows in enumerate(batches):
            self.encoder.train()
            if not self.recipe.trains_batch_norm:
                for module in self.encoder.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eval()
            done = epoch if self.recipe.by_epoch else epoch + at / len(batches)
            rate = RATE * 0.5 * (1 + math.cos(math.pi * done / EPOCHS))
            losses, correct = self.step(*self.images(rows, self.view(epoch)), rate)
            steps.append((losses, rate, rate * self.recipe.head_multiplier))
            num_correct += correct
        weights = {name: value.detach().clone() for name, value in self.named.items()}
        accuracy = num_correct / sum(len(rows) for rows in batches)
        return self.validation() | {"steps": steps, "weights": weights, "train_accuracy": accuracy}

    def step(self, images: Tensor, labels: Tensor, rate: float) -> tuple[dict[str, float], int]:
        features = self.encoder(images)
        logits = self.head(features)
        loss = entropy = F.cross_entropy(logits, labels)
        parts = {"cross_entropy": entropy.item()}
        if self.recipe.calibration is not None:
            with torch.no_grad():
                pretrained = self.frozen(images)
            parameters = {"head.weight": self.head.weight}
            calibrated = self.method.calibrated(parameters, list(features.detach()))
            of_bank = torch.tensor([label for _, _, label in self.method.bank])
            rows = torch.stack([torch.from_numpy(row) for row in calibrated])
            regularization = F.cross_entropy(self.head(rows), of_bank)
            loss = entropy + self.recipe.weight * regularization
            if self.recipe.reduction == "mean":
                loss = loss / (1 + self.recipe.weight)
            self.method.enqueue(pretrained, features.detach(), labels)
            parts["distribution_regularization"] = regularization.item()
        gradients = torch.autograd.grad(loss, list(self.named.values()), allow_unused=True)
        self.num_updates += 1
        for (name, parameter), gradient in zip(self.named.items(), gradients, strict=True):
            multiplier = self.recipe.head_multiplier if name.startswith("head.") else 1.0
            if gradient is not None:
                self.update(name, parameter.data, gradient, rate * multiplier)
        return {"loss": loss.item()} | parts, int((logits.argmax(1) == labels).sum())

    def update(self, name: str, value: Tensor, gradient: Tensor, rate: float) -> None:
        if self.recipe.optimizer == "sgd":
            gradient = gradient + DECAY * value
            former = self.memory[name]
            moving = self.memory[name] = gradient if former is None else 0.9 * former + gradient
            value -= rate * (gradient + 0.9 * moving if self.recipe.nesterov else moving)
            return
        is_decayed = value.ndim > 1 and not name.endswith(NOT_DECAYED)
        value *= 1 - rate * DECAY * is_decayed
        first, second = self.memory[name] or (torch.zeros_like(value), torch.zeros_like(value))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        self.memory[name] = first, second
        first, second = first / (1 - 0.9**self.num_updates), second / (1 - 0.999**self.num_updates)
        value -= rate * first / (second.sqrt() + 1e-8)

    @torch.no_grad()
    def validation(self) -> dict[str, float]:
        self.encoder.eval()
        rows = list(range(len(self.data.validation)))
        ((pixels, labels),) = self.data.validation_batches([rows])
        logits = self.head(self.encoder((pixels.double() / 255 - self.mean) / self.std))
        return {
            "val_accuracy": float((logits.argmax(1) == labels).double().mean()),
            "val_loss": float(F.cross_entropy(logits, labels)),
        }


# Frozen features of prepared views are stored in float32; everything else is float64.
@pytest.mark.parametrize(
    ("name", "views", "tolerance"),
    [*((name, 0, 1e-9) for name in RECIPES), ("default", 2, 1e-5)],
)
def test_a_trial_equals_a_plain_loop(trained, name: str, views: int, tolerance: float) -> None:
    found = trained(name, views)
    assert len(found["data"].train) == N
    wanted = found["expected"]
    rates = [rates for epoch in wanted for _, *rates in epoch["steps"]]
    assert [list(step.values()) for step in found["rates"]] == [
        pytest.approx(step, rel=1e-12) for step in rates
    ]
    assert [list(step) for step in found["rates"]] == [["backbone", "head"]] * len(rates)
    for record, expected in zip(found["history"], wanted, strict=True):
        assert record.steps == [pytest.approx(s, rel=tolerance) for s, *_ in expected["steps"]]
        for measure in ("val_accuracy", "val_loss", "train_accuracy"):
            assert record.metrics[measure] == pytest.approx(expected[measure], rel=tolerance)
    assert_weights(found["state"]["method"], wanted[-1]["weights"], "downstream_", tolerance)
    accuracies = [epoch["val_accuracy"] for epoch in wanted]
    best = wanted[accuracies.index(max(accuracies))]
    assert_weights(found["best"]["model"], best["weights"], "", tolerance)


def assert_weights(
    found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str, tolerance: float
) -> None:
    for name, value in expected.items():
        key = name if name.startswith("head.") else prefix + name
        torch.testing.assert_close(
            found[key], value, rtol=0.0, atol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
