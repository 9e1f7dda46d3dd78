"""A model that was trained for a few epochs on coloured pictures, and a JPEG that it classifies."""

from __future__ import annotations

from pathlib import Path

import pytest

from drtune_ray.data.pixels import DEFAULT_WHITES
from drtune_ray.results.winner import write_winner
from drtune_ray.training.checkpoint import TrialFolder, read_checkpoint
from drtune_ray.training.loop import train_epochs
from tests.small import prepared, small_trial, small_values, write_coloured


@pytest.fixture(scope="package")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders."""
    return write_coloured(tmp_path_factory.mktemp("coloured") / "images")


@pytest.fixture(scope="package")
def winner(tmp_path_factory: pytest.TempPathFactory, images: Path, weights_file) -> Path:
    """The folder of a model."""
    here = tmp_path_factory.mktemp("winner")
    settings = {"training.epochs": 6, "optim.backbone_lr": 0.005, "training.batch_norm": "local"}
    config = small_trial(small_values(images, weights_file) | settings)
    data, backbone, tables = prepared(config, here / "storage")
    folder = TrialFolder(here / "trial")
    folder.begin("a trial")
    for report in train_epochs(config, data, backbone, num_threads=1):
        report.save(folder)
    accuracy = read_checkpoint(folder.best)["record"]["metrics"]["best_val_accuracy"]
    about = {"study": "colours", "val_accuracy": accuracy, "chosen": "one training"}
    known = (tables.backbone, data.classes, config, about, "a trial", DEFAULT_WHITES)
    write_winner(here / "winner", folder.best, *known)
    return here / "winner"
