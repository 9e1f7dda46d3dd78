"""Several models on the sealed test split: one opening, and none for training code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drtune_ray.data.cache import read_images, read_table
from drtune_ray.data.sources import scan_images
from drtune_ray.data.splits import TEST, make_splits, write_manifest
from drtune_ray.errors import ConfigError
from drtune_ray.method import CETuning
from drtune_ray.results.evaluate import OPENINGS_NAME, SplitAnswers, evaluate, evaluate_models
from drtune_ray.results.winner import Winner, read_winner
from drtune_ray.storage.record import SPLITS_NAME
from drtune_ray.training.loop import train_epochs
from tests.small import prepared, small_trial, small_values


@pytest.fixture
def study(tmp_path: Path, winner: Path) -> Path:
    """The folder of a study with its splits, below a storage of its own."""
    config = read_winner(winner).trial.data
    folder = tmp_path / "studies" / "colours-compare"
    folder.mkdir(parents=True)
    splits = make_splits(scan_images(config, None), config)
    write_manifest(splits.manifest, folder / SPLITS_NAME)
    return folder


class Constant(torch.nn.Module):
    """A model that always says the first class."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(images), 3)


def test_training_code__has_no_row_of_the_test_split(tmp_path, images, weights_file, monkeypatch):
    """A planted method that asks for them gets an error, whatever it asks."""
    config = small_trial(small_values(images, weights_file) | {"training.epochs": 1})
    data, backbone, tables = prepared(config, tmp_path)
    asked: list[Callable[[], object]] = [
        lambda: data.test,  # type: ignore[attr-defined]
        lambda: next(data.validation_batches([[len(data.validation)]])),
        lambda: read_images(tables.images)[2],  # type: ignore[misc]
    ]
    for ask in asked:
        monkeypatch.setattr(CETuning, "forward", lambda *_, ask=ask: ask())
        planted = small_trial(
            small_values(images, weights_file) | {"training.epochs": 1, "method.name": "ce_tuning"}
        )
        with pytest.raises((AttributeError, IndexError, ValueError)):
            list(train_epochs(planted, data, backbone, num_threads=1))
    splits = make_splits(scan_images(config.data, None), config.data)
    sealed = set(splits.rows(TEST)["content_hash"].to_pylist())
    assert sealed and not sealed & set(read_table(tables.images)["content_hash"].to_pylist())


def opened(study: Path, winner: Path, images: Path, **more: Any) -> SplitAnswers:
    def constant() -> Winner:
        return replace(read_winner(winner), model=Constant())

    models = {"trained": lambda: read_winner(winner), "constant": constant}
    return evaluate_models(models, study, study / SPLITS_NAME, images, study.parent, **more)


def test_evaluate_models__one_opening_for_all_and_a_second_is_refused(study, winner, images):
    found = opened(study, winner, images)
    (line,) = (study.parent / OPENINGS_NAME).read_text().splitlines()
    assert json.loads(line)["model"] == str(study)
    assert (study / OPENINGS_NAME).read_text() == f"{line}\n"
    assert found.num_openings == 1 and len(found.hashes) == len(found.correct["trained"])
    assert found.correct["constant"].mean() == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match=r"opened before \(1 time\), first by .*compare"):
        opened(study, winner, images)
    with pytest.raises(ConfigError, match="add --again"):
        evaluate(winner, study / SPLITS_NAME, images, study.parent)
    again = opened(study, winner, images, again=True)
    assert again.num_openings == 2
    one = evaluate(winner, study / SPLITS_NAME, images, study.parent, again=True)
    assert one.test.num_correct == again.correct["trained"].sum() == found.correct["trained"].sum()
