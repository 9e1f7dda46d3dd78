"""Dropping, mixing, weights and balanced draws in whole trials, resumed or of some processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import TrainingData
from drtune_ray.data.table_store import TableStore
from drtune_ray.errors import ConfigError
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.study.drops import check_searched_drops
from drtune_ray.study.inputs import check_encoders, check_inputs
from drtune_ray.study.tables import prepare_all, table_variants
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.mixing import part_of
from drtune_ray.training.model import set_training_mode
from drtune_ray.training.trial import Trial
from tests.small import NORM_FREE, prepared, small_trial, small_values, write_coloured
from tests.training.test_distributed import (
    TOLERANCES,
    _final_state,
    _tensors,
    _without_times,
    largest_gap,
    make_job,
    record,
    run_group,
    train,
)
from tests.training.tiny_nfnet import TINY_NFNET

CPU = torch.device("cpu")
RESNET = "test_resnet"
ALL_OF_THEM: dict[str, Any] = {
    "data.augmentation": "rand_augment",
    "data.random_erasing": 0.5,
    "data.sampling": "class_balanced",
    "backbone.drop_path": 0.3,
    "backbone.dropout": 0.2,
    "training.label_smoothing": 0.1,
    "training.mixup": 0.4,
    "training.cutmix": 1.0,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes of different sizes."""
    folder = write_coloured(tmp_path_factory.mktemp("unequal") / "images")
    for path in sorted((folder / "red").glob("*.png"))[7:]:
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def make(images, weights_file, tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")

    def made(backbone: str = RESNET, **changes: Any) -> Trial:
        config = small_trial(small_values(images, weights_file, backbone) | changes)
        data, encoder, _ = prepared(config, storage)
        return Trial(config, data, encoder, CPU)

    return made


# ---- stochastic depth and dropout


def drop_rates(module: nn.Module) -> list[float]:
    return [float(m.drop_prob) for m in module.modules() if hasattr(m, "drop_prob")]


def test_drop_path_has_timms_rates_block_by_block(make):
    trial = make(**{"backbone.drop_path": 0.4})
    expected = drop_rates(timm.create_model(RESNET, num_classes=0, drop_path_rate=0.4))
    assert drop_rates(trial.method.downstream_encoder) == expected
    assert max(expected) == pytest.approx(0.4)


def test_dropout_zeroes_features_or_scales_them(make):
    trial = make(**{"backbone.dropout": 0.5})
    encoder = trial.method.downstream_encoder
    set_training_mode(trial.method, "frozen")
    pictures = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        dropped, whole = encoder(pictures), encoder.eval()(pictures)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert 0.35 < kept.double().mean() / (whole != 0).double().mean() < 0.65


def test_the_frozen_encoder_drops_nothing(make):
    """Live features, in train mode, are those of the encoder without dropping."""
    values = {"backbone.drop_path": 0.9, "backbone.dropout": 0.9, "data.views": 0}
    trial = make(**values)
    set_training_mode(trial.method, "local")
    frozen, pictures = trial.method.pretrained_encoder, torch.rand(3, 3, 32, 32)
    plain = make(**{"data.views": 0}).method.pretrained_encoder
    assert torch.equal(frozen(pictures), plain(pictures))
    assert sum(drop_rates(frozen)) == 0
    with torch.no_grad():
        live = trial.method.downstream_encoder
        assert not torch.equal(live(pictures), live(pictures))


def test_a_model_is_evaluated_without_dropping(make):
    trial = make(**{"backbone.drop_path": 0.9, "backbone.dropout": 0.9})
    assert trial._validate() == make()._validate()


@pytest.mark.parametrize("setting", ["drop_path", "dropout"])
def test_rates_of_zero_are_as_if_there_were_none(make, setting):
    encoder = make(**{f"backbone.{setting}": 0.0}).method.downstream_encoder.train()
    assert sum(drop_rates(encoder)) == 0


@pytest.mark.parametrize(
    ("name", "is_refused"), [("test_efficientnet", True), (NORM_FREE, False), (RESNET, False)]
)
def test_backbones_without_stochastic_depth_are_refused_in_spaces_too(
    images, weights_file, tmp_path, name, is_refused
):
    base = small_trial(small_values(images, weights_file, name))
    checked = check_inputs(base, tmp_path)
    parameters = {
        "backbone.drop_path": {"choice": [0.0, 0.2]},
        "backbone.dropout": {"float": [0, 0.3]},
    }
    space = SearchSpace.from_mapping({"parameters": parameters}, base)
    if not is_refused:
        check_searched_drops(space, base, checked)
        return
    with pytest.raises(ConfigError, match="drop_path=0.2 has no effect on test_efficientnet"):
        check_searched_drops(space, base, checked)
    # Where the other backbone alone has it, it is searched there alone.
    here, there = (str(weights_file(backbone)) for backbone in (name, RESNET))
    other = {
        "backbone.name": {"choice": [name, RESNET]},
        "backbone.weights": {"expression": f"'{here}' if backbone.name == '{name}' else '{there}'"},
        "backbone.drop_path": {"choice": [0.0, 0.2], "when": {"backbone.name": RESNET}},
    }
    space = SearchSpace.from_mapping({"parameters": other}, base)
    checked = check_encoders(checked, table_variants(space, base)[1:])
    check_searched_drops(space, base, checked)


# ---- mixing in a step


def test_a_step_with_mixing_has_the_bank_and_dr_of_one_without(make):
    """And the cross-entropy of the mixed images, smoothed; hits count the larger part's label."""
    both: dict[str, Any] = {"training.batch_size": 7, "seed": 2}
    plain = make(NORM_FREE, **both)
    changes = {"training.mixup": 0.4, "training.label_smoothing": 0.2}
    mixing = make(NORM_FREE, **both | changes)
    first = mixing.batches.rows(0)[0]
    ((pixels, labels),) = mixing.data.training_batches([first], mixing.data.view_of_epoch(0))
    pictures = mixing.normalizer(pixels)
    mixed = mixing.mixing(pictures, labels, part_of(len(first), 0, len(first)), 0, 0)
    set_training_mode(mixing.method, "frozen")
    with torch.no_grad():
        logits = mixing.method.head(mixing.method.downstream_encoder(mixed.images))
    targets = 0.8 * mixed.targets + 0.2 / 3
    wanted = -(targets * F.log_softmax(logits, 1)).sum(1).mean()
    for trial in (plain, mixing):
        trial.warm_up_bank()
        next(trial.steps())
    (_, entropy, regularization, correct), (_, _, expected, _) = (
        trial.pending[0].tolist() for trial in (mixing, plain)
    )
    assert entropy == pytest.approx(float(wanted), rel=1e-5)
    assert regularization == expected
    assert correct == float((logits.argmax(1) == mixed.targets.argmax(1)).sum())
    assert correct != float((logits.argmax(1) == labels).sum())
    for one, other in zip(mixing.method.bank.rows(), plain.method.bank.rows(), strict=True):
        assert torch.equal(one, other)


def test_ce_tuning_mixes_too(make):
    trial = make(**{"training.cutmix": 1.0, "method.name": "ce_tuning"})
    assert next(trial.steps()) and trial.mixing is not None


# ---- resumed, and by several processes


def test_a_resumed_trial_with_all_of_them_equals_the_unbroken_one(images, weights_file, tmp_path):
    changes = ALL_OF_THEM | {"training.epochs": 2, "data.views": 2}
    job = make_job(small_values(images, weights_file, RESNET) | changes, tmp_path)
    train(job, tmp_path / "unbroken")
    for num_events in (2, 5):  # in the first epoch, and after it
        folder = tmp_path / f"resumed {num_events}"
        train(job, folder, num_events)
        train(job, folder)
        wanted, found = _final_state(tmp_path / "unbroken"), _final_state(folder)
        assert _without_times(found["progress"]) == _without_times(wanted["progress"])
        tensors = dict(_tensors(found))
        for key, tensor in _tensors(wanted):
            assert torch.equal(tensors[key], tensor), key


JOBS: dict[str, dict[str, Any]] = {
    "mixed and weighted": {
        "training.mixup": 0.4,
        "training.cutmix": 1.0,
        "training.label_smoothing": 0.1,
        "training.class_weights": "balanced",
    },
    "balanced draws": {"data.sampling": "class_balanced", "training.mixup": 1.0, "data.views": 0},
}
NUM_STEPS = 8


def record_jobs(rank: int, jobs: dict[str, Any], out: Path) -> None:
    for name, job in jobs.items():
        found = record(job, NUM_STEPS)
        if rank == 0:
            torch.save(found, out / f"{name}.pt")


@pytest.mark.ddp
def test_three_processes_equal_one(images, weights_file, tmp_path):
    """Batches of 7 in shares of 3, 2 and 2, whose pairs lie in two processes; a short last one."""
    common = {
        "training.precision": "float64",
        "training.batch_size": 7,
        "training.epochs": 20,
        "data.image_size": 16,
        "optim.backbone_lr": 0.0005,
    }
    base = small_values(images, weights_file, TINY_NFNET) | common
    jobs = {name: make_job(base | changes, tmp_path) for name, changes in JOBS.items()}
    run_group(3, record_jobs, jobs, tmp_path)
    for name, job in jobs.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        assert largest_gap(found, record(job, NUM_STEPS)) < TOLERANCES["float64"], name


# ---- several image sizes


def test_sizes_of_a_space_each_have_their_tables_and_train(images, weights_file, tmp_path):
    """`data.image_size` as a small category: without a cluster, from the space to the steps."""
    base = small_trial(small_values(images, weights_file) | {"training.epochs": 1})
    space = SearchSpace.from_mapping(
        {"parameters": {"data.image_size": {"ordered": [24, 32, 48]}}}, base
    )
    checked = check_inputs(base, tmp_path)
    variants: tuple[TrialConfig, ...] = table_variants(space, base)
    checked = check_encoders(checked, variants[1:])
    with TableStore(tmp_path, base.data.cache_limit_gib) as store:
        tables = prepare_all(checked, variants, store, "cpu")
    assert len(tables) == 3
    for config in variants:
        own = tables[config.tables_key]
        backbone = read_backbone(own.backbone)
        data = TrainingData(own, config.data, backbone.normalization.interpolation)
        side = config.data.image_size
        ((pixels, _),) = data.training_batches([[0, 1]], 0)
        assert pixels.shape == (2, 3, side, side)
        encoder = backbone.build().eval()
        trial = Trial(config, data, backbone, CPU)
        with torch.no_grad():
            features = encoder(trial.normalizer(pixels))
        found = data.pretrained_features([0, 1], 0)
        assert found is not None
        torch.testing.assert_close(found, features, atol=1e-4, rtol=1e-4)
        (report,) = list(train_epochs(config, data, backbone, num_threads=1))
        assert np.isfinite(report.record.metrics["val_loss"])
        report.save(TrialFolder(tmp_path / f"{side}"))
        report.settle()
