"""Rows of METHOD.md's table that live outside `method/`: k, m, p and r."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drtune_ray.config.trial import TrialConfig
from drtune_ray.training.methods import method_scale
from drtune_ray.training.optim import build_optimizer
from drtune_ray.training.schedules import build_schedule
from drtune_ray.training.trial import Trial
from drtune_ray.values import flattened
from tests.small import prepared, small_trial, small_values, write_coloured

PRESETS = ("default", "paper", "authors")


def preset(name: str, **sections: dict[str, object]) -> TrialConfig:
    return TrialConfig.from_mapping({"data": {"train": "images"}, **sections}, preset=name)


def test_row_m__the_authors_views() -> None:
    data = preset("authors").data
    assert (data.crop_scale_min, data.horizontal_flip) == (0.4, 0.5)
    assert (data.crop_fraction, data.evaluation_resize) == (224 / 256, "square")


def test_row_p__the_authors_recipe() -> None:
    config = preset("authors")
    assert config.training.drop_last
    assert config.optim.nesterov
    assert config.optim.momentum == 0.9
    encoder, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    optimizer = build_optimizer(encoder, head, config.optim, 5.0)
    schedule = build_schedule(optimizer, config.optim, num_epochs=4, steps_per_epoch=3)
    rates = []
    for _ in range(12):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for epoch in range(4):
        of_epoch = rates[3 * epoch : 3 * epoch + 3]
        assert of_epoch == [of_epoch[0]] * 3  # stepped once an epoch
        assert of_epoch[0][1] == pytest.approx(5.0 * of_epoch[0][0])
    assert [rates[3 * e][0] for e in range(4)] == sorted({row[0] for row in rates}, reverse=True)


@pytest.mark.parametrize("name", PRESETS)
def test_row_r__k_and_b_are_constants_of_the_run(name: str) -> None:
    config = preset(name, training={"batch_size": 8}, method={"bank_size": 100})
    for num_train, bank_size in ((40, 40), (500, 100)):
        scale = method_scale(config, num_train)
        assert scale.bank_size == bank_size
        if name != "default":
            assert scale.regularization_weight == bank_size / 8
            assert scale.head_lr_multiplier == 1 + bank_size / 8


@pytest.fixture(scope="module")
def trial_of(
    tmp_path_factory: pytest.TempPathFactory, weights_file: Callable[[str], Path]
) -> Callable[[dict[str, object]], Trial]:
    folder = tmp_path_factory.mktemp("presets")
    images = write_coloured(folder / "images")

    def make(changes: dict[str, object]) -> Trial:
        config = small_trial(small_values(images, weights_file) | changes)
        data, backbone, _ = prepared(config, folder)
        return Trial(config, data, backbone, torch.device("cpu"))

    return make


def test_row_p__the_heads_first_weights(trial_of: Callable[[dict[str, object]], Trial]) -> None:
    trial = trial_of({})
    weight = trial.method.head.weight.detach()
    assert weight.numel() == 3 * 256
    assert float(weight.std()) == pytest.approx(0.01, rel=0.15)
    assert float(weight.abs().mean()) == pytest.approx(0.01 * (2 / torch.pi) ** 0.5, rel=0.15)
    assert not trial.method.head.bias.any()


def test_row_r__lambda_is_the_same_while_the_bank_fills_and_on_a_short_batch(
    trial_of: Callable[[dict[str, object]], Trial],
) -> None:
    """Batches of 8 and a shorter last one; the loss is CE + (19 / 8) DR at every step."""
    trial = trial_of({"method.regularization_weight": "bank_over_batch", "training.epochs": 1})
    for _ in trial.steps():  # without the warm-up: the first bank is empty
        pass
    trial.collect_steps()
    rows = trial._named_steps()
    assert len(rows) == 4
    assert rows[0]["distribution_regularization"] == 0.0 < rows[1]["distribution_regularization"]
    for row in rows:
        total = row["cross_entropy"] + 19 / 8 * row["distribution_regularization"]
        assert row["loss"] == pytest.approx(total)


def test_row_k__training_accuracy_counts_each_image_once_and_no_bank_row(
    trial_of: Callable[[dict[str, object]], Trial],
) -> None:
    trial = trial_of({"optim.backbone_lr": 1e-9, "training.epochs": 1})
    trial.warm_up_bank()
    for _ in trial.steps():
        pass
    trial.finish_epoch()
    metrics = trial.report().history[0].metrics
    correct = 0
    view = trial.data.view_of_epoch(0)
    rows = list(range(len(trial.data.train)))
    with torch.no_grad():
        for pixels, labels in trial.data.training_batches([rows], view):
            logits = trial.method.head(
                trial.method.downstream_encoder(trial.batches.images(pixels))
            )
            correct += int((logits.argmax(1) == labels).sum())
    assert metrics["train_accuracy"] == pytest.approx(correct / len(rows))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_and_says_what_happened(
    name: str, trial_of: Callable[[dict[str, object]], Trial]
) -> None:
    method = flattened(preset(name, method={"bank_size": 19}).method.model_dump(), "method.")
    trial = trial_of(method | {"training.epochs": 1, "optim.backbone_lr": 1e-4})
    trial.warm_up_bank()
    assert all(trial.steps())
    trial.finish_epoch()
    metrics = trial.report().history[0].metrics
    assert {"semantic_drift", "semantic_drift_remaining", "rotation_angle"} <= metrics.keys()
    assert 0.0 <= metrics["head_agreement"] <= 1.0
    assert metrics["sparse_class_share"] == 0.0
