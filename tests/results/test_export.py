"""Exported files: the same answers from each, with all that is needed inside."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

import drtune_ray
from drtune_ray.cli import cli
from drtune_ray.config.study import TrackingConfig
from drtune_ray.errors import DrtuneError, EnvironmentProblem
from drtune_ray.results import export as exporting
from drtune_ray.results.export import export, export_int8
from drtune_ray.results.exported import read_exported
from drtune_ray.results.study_images import StudyImages, study_images
from drtune_ray.results.winner import Winner, read_winner
from drtune_ray.storage.record import read_record
from drtune_ray.study.exporting import export_model
from drtune_ray.study.inputs import manifest_path
from drtune_ray.tracking.mlflow_client import default_tracking_uri
from drtune_ray.tracking.mlflow_recorder import build_recorder
from tests import past_studies

FORMATS = ["onnx", "pt2", "safetensors"]


@pytest.fixture(scope="module")
def study(winner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the splits of its study."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(winner, folder / "winner")
    manifest = manifest_path(read_winner(winner).trial.data, winner.with_name("storage"))
    shutil.copy(manifest, folder / "splits.parquet")
    return folder


@pytest.fixture(scope="module")
def known(study: Path) -> StudyImages:
    found = study_images(study, read_winner(study / "winner").trial.data)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def files(study: Path, known: StudyImages) -> dict[str, Path]:
    """The model in each format."""
    pictures = [known.open(row) for row in known.validation]
    made = {kind: study / f"model.{kind}" for kind in FORMATS}
    for path in made.values():
        found = export(read_winner(study / "winner"), path, pictures)
        assert found.num_checked == 9
        assert found.max_difference < 1e-4
    return made


@pytest.mark.parametrize("kind", FORMATS)
def test_export__gives_the_same_answers(
    files: dict[str, Path], study: Path, images: Path, tmp_path: Path, kind: str
) -> None:
    """Pictures that preprocessing treats in different ways, some of another shape."""
    Image.open(images / "red" / "00.png").resize((90, 40)).save(tmp_path / "wide.png")
    Image.open(images / "blue" / "00.png").convert("LA").save(tmp_path / "clear.png")
    deep = Image.new("I;16", (40, 30), 40_000)
    deep.save(tmp_path / "deep.png")
    paths = [*sorted(images.rglob("*.png"))[::5], *sorted(tmp_path.iterdir())]
    own, other = drtune_ray.load(study / "winner"), drtune_ray.load(files[kind], batch_size=5)
    assert other.classes == own.classes
    assert other.about == own.about
    for wanted, found in zip(own.predict(paths), other.predict(paths), strict=True):
        assert found.label == wanted.label
        assert found.probabilities == pytest.approx(wanted.probabilities, abs=1e-4)


def texts(path: Path) -> dict[str, Any]:
    """What other programs read in a file."""
    keys = ("class_names", "preprocessing", "model")
    found: dict[str, str]
    if path.suffix == ".onnx":
        import onnx

        model = onnx.load(path)
        (given,) = model.graph.input
        sides = given.type.tensor_type.shape.dim
        assert sides[0].dim_param and [side.dim_value for side in sides[1:]] == [3, 32, 32]
        found = {prop.key: prop.value for prop in model.metadata_props}
    elif path.suffix == ".pt2":
        found = dict.fromkeys(keys, "")
        torch.export.load(path, extra_files=found)
    else:
        with safe_open(path, "pt") as file:
            found = file.metadata()
    return {key: json.loads(found[key]) for key in keys}


@pytest.mark.parametrize("kind", FORMATS)
def test_export__classes_and_preprocessing_are_in_the_file(
    files: dict[str, Path], study: Path, kind: str
) -> None:
    found = texts(files[kind])
    own = read_winner(study / "winner")
    assert found["class_names"] == ["blue", "green", "red"]
    assert found["preprocessing"] == {
        "image_size": 32,
        "resize": "shorter_side",
        "crop_fraction": 0.875,
        "mean": list(own.normalization.mean),
        "std": list(own.normalization.std),
        "interpolation": own.normalization.interpolation,
        "white_values": {"integer": 65535, "floating": 255},
    }
    assert found["model"]["architecture"] == "test_efficientnet"


def test_export__int8_says_what_it_costs(study: Path, known: StudyImages) -> None:
    model, path = read_winner(study / "winner"), study / "small.onnx"
    found = export_int8(model, path, known)
    assert found.num_validated == 9
    assert found.num_correct_before == round(9 * model.about["val_accuracy"])
    labels = [row["label"] for row in known.validation]
    small = drtune_ray.load(path)
    answers = small.predict([known.open(row) for row in known.validation])
    right = [small.classes[k] == each.label for k, each in zip(labels, answers, strict=True)]
    assert found.num_correct == sum(right)
    assert path.stat().st_size < (study / "model.onnx").stat().st_size
    assert 1e-4 < found.max_difference < 0.3
    assert texts(path)["model"]["precision"] == "int8"


class Wrong(nn.Module):
    """A model that answers otherwise for several images than for one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(images)
        return logits + (torch.eye(3)[0] if len(images) > 1 else 0)


def test_export__what_gives_other_answers_is_not_written(
    study: Path, known: StudyImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> Winner:
        found = read_exported(path)
        return replace(found, model=Wrong(found.model))

    monkeypatch.setattr(exporting, "read_exported", read)
    pictures = [known.open(row) for row in known.validation[:1]]
    with pytest.raises(DrtuneError, match="differ from the model's by .* it is not written"):
        export(read_winner(study / "winner"), tmp_path / "new.safetensors", pictures)
    assert not list(tmp_path.iterdir())


def test_export__more_than_onnx_holds(study: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(exporting, "MAX_PROTOBUF_BYTES", 1000)
    with pytest.raises(EnvironmentProblem, match="at most 2 GiB in one file.* --to pt2"):
        export(read_winner(study / "winner"), tmp_path / "new.onnx", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", FORMATS)
def test_read_exported__a_damaged_or_foreign_file(
    files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    whole = files[kind].read_bytes()
    for number, content in enumerate((whole[: len(whole) // 2], b"", b"no model")):
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(content)
        with pytest.raises(EnvironmentProblem, match="is damaged, or was not written by"):
            read_exported(path)


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_read_exported__unpickles_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    planted = io.BytesIO()
    torch.save(Planted(tmp_path / "made"), planted)
    path = changed(files["pt2"], tmp_path, "/sample_inputs/model.pt", lambda _: planted.getvalue())
    with pytest.raises(EnvironmentProblem, match="is damaged"):
        read_exported(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("former", "planted"),
    [
        (b'"target": "torch.ops.aten.conv2d.default"', b'"target": "torch.os.system"'),
        (b'"target": "torch.ops.aten.conv2d.default"', b'"target": "os.system"'),
        (b'"expr_str": "', b'"expr_str": "().__class__ or '),
        (b'"expr_str": "', b'"expr_str": "open(\'x\') or '),
    ],
)
def test_read_exported__runs_no_code(
    files: dict[str, Path], tmp_path: Path, former: bytes, planted: bytes
) -> None:
    def change(graph: bytes) -> bytes:
        assert former in graph
        return graph.replace(former, planted)

    path = changed(files["pt2"], tmp_path, "/models/model.json", change)
    with pytest.raises(EnvironmentProblem, match="holds more than an exported model"):
        read_exported(path)


def changed(whole: Path, folder: Path, member: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of an archive with another member."""
    path = folder / whole.name
    with zipfile.ZipFile(whole) as before, zipfile.ZipFile(path, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, change(content) if name.endswith(member) else content)
    return path


def test_command__a_copy_of_the_model_needs_images(
    study: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study / "winner", tmp_path / "copy")
    path = tmp_path / "new" / "flowers.safetensors"
    some = str(images / "red")
    command = ["export", str(tmp_path / "copy"), "--to", "safetensors", "--output", str(path)]
    cli([*command, "--images", some], standalone_mode=False)
    said = capsys.readouterr().out
    assert str(path) in said.replace("\n", "")
    assert "on 16 images" in said.replace("\n", " ")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_command__into_the_folder_of_the_study_and_its_run(tmp_path: Path) -> None:
    """Of a study whose images are at hand, by its name."""
    folder = past_studies.install(tmp_path)
    found = export_model(folder.name, str(folder.parent), "safetensors")
    assert found.path == folder / "exports" / "small.safetensors"
    assert found.num_checked == 6
    record = read_record(folder)
    recorder = build_recorder(TrackingConfig(), folder.parent, record.study_id)
    import mlflow

    client = mlflow.MlflowClient(default_tracking_uri(folder.parent))
    sent = client.list_artifacts(recorder.run_id(None), "exports")
    assert [file.path for file in sent] == ["exports/small.safetensors"]
