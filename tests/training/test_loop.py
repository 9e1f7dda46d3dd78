"""The generator: seeded bit for bit, resumable at any save point, honest about its end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.config.metric import METRICS
from drtune_ray.data.pixels import DEFAULT_WHITES
from drtune_ray.data.views import Normalization
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.results.winner import read_winner, write_winner
from drtune_ray.training.backbones import load_backbone
from drtune_ray.training.checkpoint import TrialFolder, read_checkpoint
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.model import classifier
from drtune_ray.training.reports import (
    COMPLETED,
    DIVERGED,
    PATIENCE,
    EpochReport,
    SavePoint,
)
from drtune_ray.training.saving import Progress
from drtune_ray.training.trial import Trial
from tests.small import prepared, small_trial, small_values, write_coloured

Values = dict[str, Any]


@pytest.fixture(scope="module")
def values(tmp_path_factory, weights_file) -> Values:
    return small_values(write_coloured(tmp_path_factory.mktemp("coloured")), weights_file)


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("storage")


def events(values: Values, storage: Path, **options: Any) -> Iterator[EpochReport | SavePoint]:
    config = small_trial(values)
    data, backbone, _ = prepared(config, storage)
    return train_epochs(config, data, backbone, num_threads=1, **options)


def reports(values: Values, storage: Path, **options: Any) -> list[EpochReport]:
    return [e for e in events(values, storage, **options) if isinstance(e, EpochReport)]


def losses(found: list[EpochReport]) -> list[dict[str, float]]:
    return [step for record in found[-1].history for step in record.steps]


METHODS = {
    "default": {},
    "live features": {"data.views": 0},
    "authors": {
        "method.reduction": "mean",
        "method.regularization_weight": "bank_over_batch",
        "method.head_lr_multiplier": "one_plus_bank_over_batch",
        "method.calibration.rotation_solver": "svd",
        "method.calibration.proper_rotation": True,
        "method.calibration.rotation_kept": False,
        "method.calibration.rotation_restarts_each_epoch": True,
        "training.drop_last": True,
        "optim.schedule": "cosine_per_epoch",
        "optim.backbone_lr": 0.005,
    },
    "local BatchNorm, AdamW": {
        "training.batch_norm": "local",
        "optim.name": "adamw",
        "optim.backbone_lr": 0.001,
    },
    "ce_tuning": {"method.name": "ce_tuning"},
    "K above N": {"method.bank_size": 500},
}


@pytest.fixture(scope="module")
def unbroken(values, storage) -> Callable[[str], list[EpochReport]]:
    """Train a method from start to end, once for all tests."""
    return functools.cache(lambda name: reports(values | METHODS[name], storage))


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_gives_the_same_losses_bit_for_bit(values, storage, unbroken, name):
    first, changes = unbroken(name), METHODS[name]
    torch.rand(7)  # what happened before in the process must not matter
    assert losses(reports(values | changes, storage)) == losses(first)
    assert first[-1].outcome == COMPLETED
    assert losses(reports(values | changes | {"seed": 1}, storage)) != losses(first)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop_after", [1, 3, 4, 6])
def test_resumed_at_any_save_point_it_equals_the_unbroken_run(
    values, storage, unbroken, tmp_path, name, stop_after
):
    wanted, changes = unbroken(name), METHODS[name]
    folder = TrialFolder(tmp_path / "trial")
    # Every step is a save point here: the run is left after some of them, mid-epoch mostly.
    for count, event in enumerate(
        events(values | changes, storage, save_requested=lambda: True), start=1
    ):
        event.save(folder)
        if count == stop_after:
            break
    resumed = reports(values | changes, storage, resume=folder.newest())
    assert losses(resumed) == losses(wanted)
    pairs = zip(resumed[-1].history, wanted[-1].history, strict=True)
    for found, expected in pairs:
        drop = {"seconds"}
        assert {k: v for k, v in found.metrics.items() if k not in drop} == {
            k: v for k, v in expected.metrics.items() if k not in drop
        }


def test_final_weights_after_resuming_are_equal_bit_for_bit(values, storage, tmp_path):
    def run(folder: TrialFolder, **options: Any) -> dict[str, torch.Tensor]:
        for event in events(values, storage, **options):
            event.save(folder)
        return read_checkpoint(folder.path / "epoch-00003-step-0000000.ckpt")["method"]

    unbroken = run(TrialFolder(tmp_path / "unbroken"))
    broken = TrialFolder(tmp_path / "broken")
    for event in events(values, storage, save_requested=lambda: True):
        event.save(broken)
        if isinstance(event, SavePoint) and (event.epoch, event.step) == (1, 2):
            break
    resumed = run(broken, resume=broken.newest())
    assert unbroken.keys() == resumed.keys()
    for name, tensor in unbroken.items():
        same = torch.equal(tensor, resumed[name]) if torch.is_tensor(tensor) else False
        assert same or tensor == resumed[name], name


def test_a_trial_that_had_ended_says_again_how(values, storage, tmp_path):
    folder = TrialFolder(tmp_path)
    for event in events(values, storage):
        event.save(folder)
    again = reports(values, storage, resume=folder.newest())
    assert [report.outcome for report in again] == [COMPLETED]
    assert [record.epoch for record in again[0].history] == [1, 2, 3]


def test_save_points_come_when_asked_and_only_then(values, storage):
    asked = iter([False, True, False, False] + [False] * 20)
    found = list(events(values, storage, save_requested=lambda: next(asked)))
    points = [event for event in found if isinstance(event, SavePoint)]
    assert [(point.epoch, point.step) for point in points] == [(0, 2)]


def test_save_points_come_after_save_every_seconds(values, storage):
    found = list(events(values | {"training.save_every_seconds": 1e-9}, storage))
    assert sum(isinstance(event, SavePoint) for event in found) == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("views", [0, 2])
def test_no_step_of_a_trial_waits_for_the_device(values, storage, views):
    config = small_trial(values | {"data.views": views})
    data, backbone, _ = prepared(config, storage)
    trial = Trial(config, data, backbone, torch.device("cuda"))
    trial.warm_up_bank()
    steps = trial.steps()
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_feature_that_is_not_finite_ends_the_trial_as_diverged(values, storage, monkeypatch):
    """Though the loss stays finite: the frozen feature of one image in the second epoch."""
    config = small_trial(values)
    data, backbone, _ = prepared(config, storage)
    whole = data.pretrained_features

    def broken(rows, view):
        features = whole(rows, view)
        if view == data.view_of_epoch(1):
            features[0, 3] = torch.inf
        return features

    monkeypatch.setattr(data, "pretrained_features", broken)
    # The warm-up reads the view before the first epoch's: with two views that is the second's.
    monkeypatch.setattr(Trial, "warm_up_bank", lambda trial: None)
    found = list(train_epochs(config, data, backbone, num_threads=1))
    assert [event.outcome for event in found] == [None, DIVERGED]
    assert len(found[-1].history) == 1


def test_a_diverging_loss_ends_the_trial_and_keeps_what_was_finished(values, storage):
    found = reports(values | {"optim.backbone_lr": 1e20}, storage)
    assert found[-1].outcome == DIVERGED
    assert found[-1].record is None
    assert len(found) == 1


def test_weights_that_the_last_update_broke_cannot_be_the_best(values, storage, monkeypatch):
    sound = Trial._validate

    def broken(trial: Trial) -> dict[str, float]:
        found = sound(trial)
        if trial.progress.epochs_done == 1:
            return {"val_accuracy": 1.0, "val_loss": float("nan")}
        return found

    monkeypatch.setattr(Trial, "_validate", broken)
    found = reports(values, storage)
    assert found[-1].outcome == DIVERGED
    assert [record.epoch for record in found[-1].history] == [1]
    assert found[-1].record.metrics["best_val_accuracy"] < 1.0


@pytest.mark.parametrize(("name", "best"), [("val_accuracy", 3), ("log_loss", 2), ("macro_f1", 4)])
def test_the_metric_chooses_epoch_weights_and_end(
    values, storage, tmp_path, monkeypatch, name: str, best: int
) -> None:
    measures = ("val_accuracy", "val_loss", "val_macro_f1")
    epochs = [
        (0.5, 0.9, 0.1),
        (0.6, 0.3, 0.1),
        (0.7, 0.8, 0.1),
        (0.7, 0.3, 0.2),
        (0.1, 0.9, 0.2),
        (0.2, 0.4, 0.2),
    ]

    def validated(trial: Trial) -> dict[str, float]:
        return dict(zip(measures, epochs[trial.progress.epochs_done], strict=True))

    monkeypatch.setattr(Trial, "_validate", validated)
    settings = {"training.epochs": 6, "training.patience_epochs": 3, "training.metric": name}
    folder = TrialFolder(tmp_path)
    folder.begin("a trial")
    for report in events(values | settings, storage):
        report.save(folder)
    assert isinstance(report, EpochReport) and report.record is not None
    metric = METRICS[name]
    value = epochs[best - 1][measures.index(metric.measure)]
    assert report.best_value == report.record.metrics[metric.best] == value
    assert report.record.metrics["best_epoch"] == best
    assert read_checkpoint(folder.best)["record"]["epoch"] == best
    assert report.record.epoch == min(best + 3, 6)
    (state,) = [folder.newest()]
    assert state is not None and state["progress"]["best_value"] == value
    former = {k: v for k, v in state["progress"].items() if k != "best_value"}
    assert Progress.of(former | {"best_val_accuracy": 0.7}).best_value == 0.7  # of 0.1.0
    assert Progress.of(former | {"best_val_accuracy": -1.0}).best_value is None


def test_patience_ends_the_trial_with_its_best(values, storage):
    settings = {
        "training.epochs": 30,
        "training.patience_epochs": 1,
        "optim.backbone_lr": 1e-9,  # nothing is learned: no epoch is better than the first
    }
    found = reports(values | settings, storage)
    assert found[-1].outcome == PATIENCE
    assert len(found) == 2
    best = found[-1].record.metrics
    assert best["best_epoch"] == 1
    assert best["best_val_accuracy"] == found[0].record.metrics["val_accuracy"]


def test_it_learns(values, storage):
    # The test's weights are random: BatchNorm must find its statistics first.
    settings = {
        "training.epochs": 8,
        "training.batch_norm": "local",
        "optim.name": "adamw",
        "optim.backbone_lr": 0.003,
    }
    found = reports(values | settings, storage)
    assert found[-1].record.metrics["best_val_accuracy"] > 0.6


def test_best_checkpoint_gives_the_recorded_accuracy(values, storage, tmp_path):
    config = small_trial(values)
    data, backbone, _ = prepared(config, storage)
    folder = TrialFolder(tmp_path)
    for event in train_epochs(config, data, backbone, num_threads=1):
        event.save(folder)
    best = read_checkpoint(folder.best)
    model = classifier(backbone.name, backbone.image_size, best["model"])
    from drtune_ray.training.frozen_features import Normalizer

    rows = list(range(len(data.validation)))
    pixels, labels = next(data.validation_batches([rows]))
    right = (
        model(Normalizer(backbone.normalization, torch.device("cpu"))(pixels)).argmax(1) == labels
    )
    assert right.double().mean().item() == best["record"]["metrics"]["best_val_accuracy"]
    assert best["record"]["epoch"] == best["record"]["metrics"]["best_epoch"]


def test_frozen_batch_norm_keeps_the_pretrained_statistics(values, storage, tmp_path):
    def moved(batch_norm: str) -> bool:
        folder = TrialFolder(tmp_path / batch_norm)
        for event in events(values | {"training.batch_norm": batch_norm}, storage):
            event.save(folder)
        _, backbone, _ = prepared(small_trial(values), storage)
        trained = read_checkpoint(folder.best)["model"]
        return not all(
            torch.equal(tensor, trained[f"encoder.{name}"])
            for name, tensor in backbone.state.items()
            if "running" in name
        )

    assert not moved("frozen")
    assert moved("local")


def test_each_epoch_reports_parts_rates_and_seconds(values, storage):
    metrics = reports(values, storage)[0].record.metrics
    parts = ("loss", "cross_entropy", "distribution_regularization")
    assert metrics["loss"] == pytest.approx(metrics[parts[1]] + metrics[parts[2]])
    assert {"lr_backbone", "lr_head", "seconds", "train_accuracy", "val_loss"} <= metrics.keys()
    assert metrics["bank_rows"] == 19


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["auto", "float32", "float16"])
def test_trains_on_a_gpu(values, storage, precision):
    found = reports(
        values | {"training.precision": precision}, storage, device=torch.device("cuda", 0)
    )
    assert found[-1].outcome == COMPLETED


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_out_of_memory_is_raised_and_the_next_trial_trains(values, storage):
    device = torch.device("cuda", 0)
    expected = losses(reports(values, storage, device=device))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            reports(values, storage, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = losses(reports(values, storage, device=device))
    assert found[0] == pytest.approx(expected[0], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("views", [0, 2])
def test_batches_lie_in_pinned_memory(values, storage, views):
    data, _, _ = prepared(small_trial(values | {"data.views": views}), storage)
    pixels, labels = next(iter(data.training_batches([[0, 1, 2]], data.view_of_epoch(0))))
    assert pixels.is_pinned() and labels.is_pinned()


def test_best_checkpoint__is_a_weights_file(values: Values, storage: Path, tmp_path: Path) -> None:
    normalization = {"backbone.mean": [0.1, 0.2, 0.3], "backbone.std": [0.4, 0.5, 0.6]}
    config = small_trial(values | normalization | {"training.epochs": 1})
    data, backbone, tables = prepared(config, storage)
    folder = TrialFolder(tmp_path / "trial")
    folder.begin("a trial")
    for report in train_epochs(config, data, backbone, num_threads=1):
        report.save(folder)
    encoder = behind_encoder(read_checkpoint(folder.best)["model"])
    best = read_checkpoint(folder.best)
    about = {"val_accuracy": best["record"]["metrics"]["best_val_accuracy"]}
    write_winner(
        tmp_path / "winner",
        folder.best,
        tables.backbone,
        data.classes,
        config,
        about,
        "a trial",
        DEFAULT_WHITES,
    )
    for path in (folder.best, tmp_path / "winner" / "model.safetensors"):
        given = BackboneConfig(name=config.backbone.name, weights=str(path))
        found, report = load_backbone(given, config.data.image_size)
        assert report.matched_share == 1.0
        last = "head" if path == folder.best else "classifier"
        assert report.unused == (f"{last}.bias", f"{last}.weight")
        assert all(torch.equal(tensor, encoder[name]) for name, tensor in found.state.items())
        assert found.normalization == Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")


def test_winner__a_changed_bit_is_seen_before_it_is_used(values, storage, tmp_path):
    config = small_trial(values | {"training.epochs": 1})
    data, backbone, tables = prepared(config, storage)
    folder = TrialFolder(tmp_path / "trial")
    folder.begin("a trial")
    for report in train_epochs(config, data, backbone, num_threads=1):
        report.save(folder)
    best = read_checkpoint(folder.best)
    about = {"val_accuracy": best["record"]["metrics"]["best_val_accuracy"]}
    winner = tmp_path / "winner"
    known = (tables.backbone, data.classes, config, about, "a trial", DEFAULT_WHITES)
    write_winner(winner, folder.best, *known)
    assert read_winner(winner).classes == data.classes
    for name in ("model.safetensors", "model.yaml"):
        content = (winner / name).read_bytes()
        at = content.rindex(b"blue") if name == "model.yaml" else len(content) - 2
        changed = bytearray(content)
        changed[at] ^= 1
        (winner / name).write_bytes(changed)
        with pytest.raises(EnvironmentProblem, match=f"{name} is damaged .the checksum is another"):
            read_winner(winner)
        (winner / name).write_bytes(content)


def behind_encoder(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix("encoder."): t for n, t in model.items() if n.startswith("encoder.")}
