"""Predictions: from Python and from the command line, for images of every kind."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import drtune_ray
from drtune_ray.cli import cli
from drtune_ray.data.sources import scan_images
from drtune_ray.data.splits import VALIDATION, make_splits
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.results.predict import Model, Unreadable
from drtune_ray.results.winner import read_winner
from tests import past_studies


@pytest.fixture(scope="module")
def model(winner: Path) -> Model:
    return drtune_ray.load(winner)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], winner: Path):
    """Run `drtune-ray predict` on the model; return what it printed."""

    def run(*arguments: str) -> str:
        cli(["predict", str(winner), *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_predict__every_kind_of_image_gives_the_same(model: Model, images: Path) -> None:
    path = images / "red" / "03.png"
    picture = Image.open(path)
    kinds = [path, str(path), picture, np.asarray(picture), picture.convert("P").convert("RGB")]
    found = model.predict(kinds[:4])
    assert [each.image for each in found] == [str(path)] * 2 + [None] * 2
    assert len({tuple(each.probabilities.items()) for each in found}) == 1
    for each in found:
        assert set(each.probabilities) == set(model.classes) == {"blue", "green", "red"}
        assert sum(each.probabilities.values()) == pytest.approx(1)
        assert (
            each.probability == each.probabilities[each.label] == max(each.probabilities.values())
        )
    gray = np.zeros((9, 9), np.uint8)
    assert model.predict(gray) == model.predict([np.zeros((9, 9, 3), np.uint8)])
    assert model.predict([]) == []


def test_predict__gives_the_recorded_accuracy_in_order(winner: Path, images: Path) -> None:
    model = drtune_ray.load(winner, batch_size=3)
    trial = read_winner(winner).trial
    rows = make_splits(scan_images(trial.data), trial.data).rows(VALIDATION)
    paths = [str(images / name) for name in rows["path"].to_pylist()]
    found = model.predict(paths)
    assert [each.image for each in found] == paths
    right = [each.label == Path(each.image).parent.name for each in found]
    assert sum(right) / len(right) == pytest.approx(model.about["val_accuracy"])
    assert 0.5 < sum(right) / len(right)


def test_predict__turned_pictures_are_upright(model: Model, images: Path, tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = (200, 50, 50)
    upright, turned = Image.fromarray(pixels), Image.fromarray(np.rot90(pixels))
    exif = Image.Exif()
    exif[274] = 6  # turn it by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    found = model.predict([upright, tmp_path / "turned.png", Image.open(tmp_path / "turned.png")])
    assert len({each.probability for each in found}) == 1


def test_predict__what_cannot_be_read_leaves_the_others(model: Model, images, tmp_path) -> None:
    sound = images / "blue" / "00.png"
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(sound.read_bytes()[:90])
    bad = [tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "nowhere.png", tmp_path]
    found = list(model.stream([sound, *bad, np.zeros((3, 3), np.float32), sound]))
    assert [isinstance(each, Unreadable) for each in found] == [False, *[True] * 5, False]
    assert found[0] == found[-1]
    assert found[3].reason == "not readable (No such file or directory)"
    assert "must be uint8 of shape (H, W, 3) or (H, W)" in found[5].reason
    with pytest.raises(ConfigError, match="text.png: no image that Pillow decodes"):
        model.predict([sound, tmp_path / "text.png"])


def test_load__a_study_of_an_earlier_release_by_name_and_folder(tmp_path: Path) -> None:
    """Its weights have other names than those of timm."""
    folder = past_studies.install(tmp_path)
    picture = np.full((20, 20, 3), 90, np.uint8)
    known = [
        drtune_ray.load(folder),
        drtune_ray.load(folder / "winner"),
        drtune_ray.load(folder.name, storage=folder.parent),
    ]
    assert len({model.predict(picture)[0].probability for model in known}) == 1


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gpu", ConfigError, "device='gpu' is not a device: give cpu, cuda or cuda:1"),
        ("cuda:77", EnvironmentProblem, "this machine has no device cuda:77 .*: give cpu"),
    ],
)
def test_load__device(winner: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        drtune_ray.load(winner, device=name)


def test_command__csv_of_files_folders_patterns_and_a_list(said, images, monkeypatch) -> None:
    one, two = str(images / "blue" / "00.png"), str(images / "red" / "00.png")
    found = rows(said(one, two))
    assert [row["image"] for row in found] == [one, two]
    assert found[0].keys() == {"image", "label", "probability"}
    assert len(rows(said(str(images)))) == 48
    assert [row["image"] for row in rows(said(str(images / "*" / "00.png")))][::2] == [one, two]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{two}\n\n{one}\n"))
    assert [row["image"] for row in rows(said("-"))] == [two, one]


def test_command__formats_agree(said, images: Path, tmp_path: Path) -> None:
    folder, more = str(images / "green"), ["--top", "9", "--probabilities"]
    by_csv = rows(said(folder, *more))
    by_json = [json.loads(line) for line in said(folder, *more, "--format", "jsonl").splitlines()]
    assert said(folder, *more, "--output", str(tmp_path / "out.parquet")) == ""
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.to_pylist() == by_json
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]
    ranks = [f"{name}_{rank}" for rank in (2, 3) for name in ("label", "probability")]
    each = [f"probability of {name}" for name in ("blue", "green", "red")]
    assert list(by_json[0]) == ["image", "label", "probability", *ranks, *each]
    for first, second in zip(by_csv, by_json, strict=True):
        assert first["label"] == second["label"]
        assert float(first["probability"]) == pytest.approx(second["probability"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out.txt"], "the suffix '.txt' names no format"),
        (["--format", "parquet"], "--format parquet needs --output FILE"),
        (["--output", "nowhere/out.csv"], "nowhere/out.csv cannot be written"),
    ],
)
def test_command__refused(said, images, monkeypatch, tmp_path, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        said(str(images), *arguments)
    assert not list(tmp_path.iterdir())


def test_command__nothing_to_classify(said, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no image in the folder"):
        said(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no file matches '.*\*\.jpg': correct the pattern"):
        said(str(tmp_path / "*.jpg"))


@pytest.mark.slow
def test_command__an_unreadable_image_is_the_exit_code(winner, images, tmp_path) -> None:
    sound, missing = images / "blue" / "00.png", tmp_path / "nowhere.png"
    command = [sys.executable, "-m", "drtune_ray", "predict", str(winner), str(missing), str(sound)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"drtune-ray: {missing}: not readable (No such file or directory)\n"
    assert [row["image"] for row in rows(done.stdout)] == [str(sound)]
