"""Accuracy on rows of a manifest, decoded in threads a batch ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drtune_ray.data.pixels import DEFAULT_WHITES
from drtune_ray.data.splits import VALIDATION, read_manifest
from drtune_ray.errors import ConfigError
from drtune_ray.results.evaluate import measure
from drtune_ray.results.evaluation_record import Accuracy
from drtune_ray.results.inference import in_batches
from drtune_ray.results.winner import Winner, read_winner
from drtune_ray.study.inputs import manifest_path


@pytest.fixture(scope="module")
def model(winner: Path) -> Winner:
    return read_winner(winner)


@pytest.fixture(scope="module")
def rows(winner: Path, model: Winner) -> list[dict[str, Any]]:
    """The rows for validation."""
    manifest = read_manifest(manifest_path(model.trial.data, winner.with_name("storage")))
    assert manifest is not None
    return [row for row in manifest.to_pylist() if row["split"] == VALIDATION]


@pytest.mark.parametrize("batch_size", [1, 4, 9, 64])
def test_measure__gives_the_accuracy_of_training(model, images, rows, batch_size) -> None:
    assert len(rows) == 9
    found = measure(model, images, rows, DEFAULT_WHITES, batch_size)
    assert (found.accuracy, found.num_images) == (model.about["val_accuracy"], 9)
    assert Accuracy.of(found).share == found.accuracy
    right = {row["path"]: row["label"] for row in rows} | {
        each.path: model.classes.index(each.predicted) for each in found.mistakes
    }
    wrong = [row | {"label": (right[row["path"]] + 1) % 3} for row in rows]
    opposite = measure(model, images, wrong, DEFAULT_WHITES, batch_size)
    assert opposite.accuracy == 0.0
    assert {each.path for each in opposite.mistakes} == {row["path"] for row in rows}


def test_measure__names_a_file_that_is_missing(model, rows, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*; restore the file"):
        measure(model, tmp_path, rows, DEFAULT_WHITES)


def test_in_batches__one_is_made_ahead_and_no_more() -> None:
    made: list[int] = []

    def make(number: int) -> torch.Tensor:
        made.append(number)
        return torch.tensor(number)

    seen: list[int] = []
    for part, views in in_batches(make, iter(range(11)), 3):
        assert [int(view) for view in views] == part
        seen += part
        assert len(made) <= len(seen) + 3
    assert seen == list(range(11))
