"""Metrics of images in class folders; those of the sealed split enter none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import drtune_ray
from drtune_ray.cli import cli
from drtune_ray.data.splits import TRAIN, read_manifest, write_manifest
from drtune_ray.display.tables import measured_lines
from drtune_ray.results.evaluate import images_of
from drtune_ray.results.labelled import Measured, labels_below
from drtune_ray.results.winner import read_winner
from drtune_ray.storage.record import SPLITS_NAME
from drtune_ray.study.inputs import manifest_path


@pytest.fixture(scope="module")
def study(winner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study with the model and its splits."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(winner, folder / "winner")
    path = manifest_path(read_winner(winner).trial.data, winner.with_name("storage"))
    manifest = read_manifest(path)
    assert manifest is not None
    write_manifest(manifest, folder / SPLITS_NAME)
    return folder


def test_labels_below__by_class_folders(images: Path, tmp_path: Path) -> None:
    labels = labels_below([str(images), str(tmp_path), "1.png"], ["red", "blue"])
    assert {Path(path).parent.name: label for path, label in labels.items()} == {
        "red": 0,
        "blue": 1,
    }
    assert set(labels) == {str(path) for path in images.glob("[rb]*/*")}


def test_measured__leaves_out_the_sealed_images(study: Path, images: Path, tmp_path: Path) -> None:
    """Copies under other names are recognised by their content."""
    copies = tmp_path / "copies"
    for number, path in enumerate(sorted(images.glob("*/*"))):
        there = copies / path.parent.name / f"copy{number}{path.suffix}"
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there)
    model = drtune_ray.load(study / "winner")
    known = images_of(model.folder.parent)
    assert known is not None and known.sealed and not known.sealed & known.used
    paths = sorted(map(str, copies.glob("*/*")))
    measured = Measured(labels_below([str(copies)], model.classes), model.classes, known)
    predictions = list(measured.watched(model.predict(paths)))
    assert [each.image for each in predictions] == paths  # classified all the same
    tables = measured.tables()
    assert tables is not None
    assert (measured.num_sealed, measured.num_used) == (len(known.sealed), tables.num_images)
    assert tables.num_images == len(paths) - len(known.sealed)
    manifest = read_manifest(study / SPLITS_NAME)
    assert manifest is not None
    others = [row for row in manifest.to_pylist() if row["content_hash"] in known.used]
    rows = {Path(row["path"]).parent.name: 0 for row in others}
    assert set(rows) == {row.name for row in tables.classes if row.support}
    said = list(measured_lines(measured))
    assert said[0].startswith(f"{len(known.sealed)} of these images are in the study's sealed")
    assert "of them trained or chose the model: the metrics are too good." in said[2]
    assert any(row["split"] == TRAIN for row in others)


def test_predict__prints_metrics_beside_the_predictions(
    study: Path, winner: Path, images: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    for path in images.glob("red/*"):
        (new / "red").mkdir(parents=True, exist_ok=True)
        (new / "red" / path.name).write_bytes(path.read_bytes() + b" ")  # of other content
    run = CliRunner().invoke(cli, ["predict", str(study / "winner"), str(new)])
    assert run.exit_code == 0, run.output
    lines = run.stdout.splitlines()
    assert lines[0] == "image,label,probability" and len(lines) == 1 + len(list(new.glob("red/*")))
    right = sum(line.split(",")[1] == "red" for line in lines[1:]) / (len(lines) - 1)
    assert f"Accuracy {right:.2%}".replace("%", " %") in run.stderr
    assert "too good" not in run.stderr and "sealed" not in run.stderr
    apart = CliRunner().invoke(cli, ["predict", str(winner), str(new)])
    assert "whether it trained on them is not known" in apart.stderr
    alone = CliRunner().invoke(cli, ["predict", str(winner), str(next(new.glob("red/*")))])
    assert alone.exit_code == 0 and alone.stderr == ""
