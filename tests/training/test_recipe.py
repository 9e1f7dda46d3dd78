"""What a trial does at each step, epoch and resume, against the same thing computed otherwise.

Each test fails for a small change of the recipe that trains all the same: see `tests.mutants`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from drtune_ray.data.views import Normalization
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.frozen_features import Normalizer
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.model import generator
from drtune_ray.training.trial import Trial
from tests.small import prepared, small_trial, small_values, write_coloured

CPU = torch.device("cpu")
BATCH, EPOCHS = 8, 3


class Trained:
    """A trial of a few steps and what it is made of."""

    def __init__(self, values: dict[str, Any], storage: Any) -> None:
        self.config = small_trial(values)
        self.data, self.backbone, _ = prepared(self.config, storage)
        self.trial = Trial(self.config, self.data, self.backbone, CPU)

    def epochs(self, **options: Any) -> list[Any]:
        return list(train_epochs(self.config, self.data, self.backbone, **options))


@pytest.fixture(scope="module")
def made(tmp_path_factory, weights_file):
    storage = tmp_path_factory.mktemp("storage")
    base = small_values(write_coloured(storage / "images"), weights_file)

    def make(**changes: Any) -> Trained:
        return Trained(base | {"training.epochs": EPOCHS} | changes, storage)

    return make


def pixels(number: int) -> torch.Tensor:
    drawn = torch.randint(
        0, 256, (number, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return drawn


def test_pixels_are_scaled_to_one_before_they_are_normalised():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    images = Normalizer(Normalization(mean, std, "bicubic"), CPU)(pixels(2))
    wanted = (pixels(2).double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    assert torch.allclose(images.double(), wanted, atol=1e-6)


# ---- the order of the images


def test_each_epoch_has_an_order_of_its_own_that_holds_every_image_once(made):
    trial = made().trial
    orders = [sum(trial.batches.rows(epoch), []) for epoch in (-1, 0, 1, 2)]
    assert all(sorted(order) == list(range(len(trial.data.train))) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_bank_is_warmed_up_by_the_first_rows_of_a_pass(made):
    trained = made()
    trial = trained.trial
    trial.warm_up_bank()
    size = trained.config.method.bank_size
    order = generator(trained.config.seed, "order", -1)
    rows = torch.randperm(len(trained.data.train), generator=order).tolist()[:size]
    pretrained, _, labels = trial.method.bank.rows()
    view = trained.data.view_of_epoch(-1)
    assert torch.equal(pretrained, trained.data.pretrained_features(rows, view))
    assert labels.tolist() == [trained.data.train.labels[row] for row in rows]


def test_a_resumed_trial_has_its_bank_from_the_checkpoint(made, tmp_path, monkeypatch):
    trained = made()
    folder = TrialFolder(tmp_path)
    events = train_epochs(trained.config, trained.data, trained.backbone)
    report = next(events)
    report.save(folder)
    report.settle()
    resume = folder.newest()
    monkeypatch.setattr(Trial, "warm_up_bank", lambda trial: pytest.fail("warmed up again"))
    first = next(train_epochs(trained.config, trained.data, trained.backbone, resume=resume))
    assert first.record.epoch == 2


# ---- learning rates


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_recorded_rates_are_those_of_the_epochs_last_step(made, drop_last):
    trained = made(**{"training.drop_last": drop_last})
    num_train, multiplier = len(trained.data.train), 1.0
    steps = num_train // BATCH if drop_last else -(-num_train // BATCH)
    assert num_train % BATCH  # otherwise there is no last batch to drop
    for report in trained.epochs():
        done = report.record.epoch * steps - 1
        rate = trained.config.optim.backbone_lr
        rate *= 0.5 * (1 + math.cos(math.pi * done / (EPOCHS * steps)))
        assert report.record.metrics["lr_backbone"] == pytest.approx(rate, rel=1e-12)
        assert report.record.metrics["lr_head"] == pytest.approx(rate * multiplier, rel=1e-12)
        assert len(report.record.steps) == steps


class Recorded:
    """A GradScaler that scales nothing and records its calls."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def unscale_(self, optimizer: Any) -> None:
        self._calls.append("unscale")

    def scale(self, loss: torch.Tensor) -> Any:
        self._calls.append("scale")
        backward = loss.backward

        class Scaled:
            def backward(scaled) -> None:  # noqa: N805
                self._calls.append("backward")
                backward()

        return Scaled()

    def step(self, optimizer: Any) -> None:
        self._calls.append("step")
        optimizer.step()

    def update(self) -> None:
        self._calls.append("update")

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return 1.0


def test_an_update_clears_the_gradients_scales_the_loss_steps_and_adapts_the_scale(made):
    trial = made().trial
    calls: list[str] = []
    trial.updater.scaler = Recorded(calls)
    clear, follow = trial.optimizer.zero_grad, trial.schedule.step
    trial.optimizer.zero_grad = lambda **options: (calls.append("clear"), clear(**options))[1]
    trial.schedule.step = lambda: (calls.append("schedule"), follow())[1]
    loss = sum(p.sum() for p in trial.method.downstream_encoder.parameters())
    trial._update(loss + sum(p.sum() for p in trial.method.head.parameters()))
    assert calls == ["clear", "scale", "backward", "unscale", "step", "update", "schedule"]


# ---- precision and modes


@pytest.mark.parametrize("name", ["dr_tune", "ce_tuning"])
def test_mixed_precision_holds_in_warm_up_step_and_validation(made, name):
    changes = {"training.precision": "bfloat16", "method.name": name, "data.views": 0}
    trial = made(**changes).trial
    seen: list[torch.dtype] = []
    encoders = [trial.method.downstream_encoder, getattr(trial.method, "pretrained_encoder", None)]
    for encoder in filter(None, encoders):
        encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trial.warm_up_bank()
    num_seen = [len(seen)]
    next(trial.steps())
    num_seen.append(len(seen))
    trial._validate()
    num_seen.append(len(seen))
    assert (num_seen[0] > 0) == (name == "dr_tune") and sorted(set(num_seen)) == num_seen
    assert set(seen) == {torch.bfloat16}


def test_validation_runs_in_eval_mode_and_counts_each_image_once(made):
    trained = made(**{"training.batch_norm": "local"})
    trial = trained.trial
    for _ in trial.steps():
        pass
    found = trial._validate()
    model = nn.Sequential(trial.method.downstream_encoder, trial.method.head).eval()
    (batch,) = trained.data.validation_batches([list(range(len(trained.data.validation)))])
    images, labels = batch
    with torch.inference_mode():
        logits = model(trial.normalizer(images)).double()
    assert found["val_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert found["val_accuracy"] == float((logits.argmax(1) == labels).double().mean())


def test_the_processes_share_the_validation_images(made, monkeypatch):
    """Each image is validated once: twice would not change the measures, only their cost."""
    trial = made().trial
    batches = trial.data.validation_batches
    rows: list[int] = []

    def recorded(wanted: list[list[int]]) -> Any:
        rows.extend(row for batch in wanted for row in batch)
        return batches(wanted)

    monkeypatch.setattr(trial.data, "validation_batches", recorded)
    monkeypatch.setattr(trial.group, "sum", lambda tensor: tensor)
    gathered = lambda rows, shares: torch.cat([rows] * 3)[: sum(shares)]  # noqa: E731
    monkeypatch.setattr(trial.group, "gather_rows", gathered)
    trial.group.world_size = 2
    for rank in (0, 1):
        trial.group.rank = rank
        trial._validate()
    assert sorted(rows) == list(range(len(trial.data.validation)))
