"""The folder of a model as others use it: with timm alone, its card, its checksums."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import drtune_ray
from drtune_ray.data.splits import VALIDATION, read_manifest
from drtune_ray.results.evaluate import measure
from drtune_ray.results.package import timm_layout, to_timm
from drtune_ray.results.winner import is_sound, read_winner
from drtune_ray.study.inputs import manifest_path
from drtune_ray.training.backbones import create_encoder
from drtune_ray.training.model import classifier
from tests.small import WINNER_FILES

NOT_HERE = "import sys\nsys.modules['drtune_ray'] = None\n"


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_package__loads_with_timm_alone(winner: Path, images: Path, tmp_path: Path) -> None:
    """The lines of the model card, in a process that cannot import this project."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(winner, folder)
    Image.open(images / "red" / "00.png").resize((50, 40)).save(folder / "image.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", card(folder), re.DOTALL)
    assert len(code.splitlines()) <= 7
    shown = "\nprint(json.dumps([float(p) for p in probabilities]))"
    done = subprocess.run(
        [sys.executable, "-c", NOT_HERE + code + shown],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    label, probabilities = done.stdout.splitlines()
    model = drtune_ray.load(folder)
    (found,) = model.predict(folder / "image.jpg")
    assert label == found.label
    own = [found.probabilities[name] for name in model.classes]
    assert json.loads(probabilities) == pytest.approx(own, abs=1e-4)


def test_package__files(winner: Path) -> None:
    assert sorted(path.name for path in winner.iterdir()) == WINNER_FILES
    assert {path.stat().st_mode & 0o777 for path in winner.iterdir()} == {0o644}
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=winner, check=True)
    config = json.loads((winner / "config.json").read_text())
    assert config["label_names"] == ["blue", "green", "red"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    head = yaml.safe_load(card(winner).split("---")[1])
    assert head["library_name"] == "timm"


def test_package__the_card_says_how_sure_the_accuracy_is(winner: Path) -> None:
    about = drtune_ray.load(winner).about
    assert f"{about['val_accuracy']:.1%} on the validation images: these weights" in card(winner)
    assert "`drtune-ray evaluate` measures it on test images" in card(winner)


def test_package__the_card_names_metrics_weak_classes_and_confusions(
    winner: Path, images: Path, tmp_path: Path
) -> None:
    """As a pass over the validation images measures them."""
    model = read_winner(winner)
    manifest = read_manifest(manifest_path(model.trial.data, winner.with_name("storage")))
    assert manifest is not None
    rows = [row for row in manifest.to_pylist() if row["split"] == VALIDATION]
    found = measure(model, images, rows, model.whites)
    text = card(winner)
    for label, value in [
        ("balanced validation accuracy", found.balanced_accuracy),
        ("macro F1 on the validation images", found.macro_f1),
        ("AUROC on the validation images", found.auroc),
    ]:
        assert f"- {label}: {value:.4f}" in text
    for row in found.weakest():
        assert f"| {row.name} | {row.support} | {row.recall:.1%} | {row.f1:.1%} |" in text
    for pair in found.confusions()[:5]:
        assert f"| {pair.true} | {pair.predicted} | {pair.num_images} |" in text
    assert bool(found.confusions()) == ("most often confused with" in text)


def test_is_sound__says_whether_the_files_are_whole(winner: Path, tmp_path: Path) -> None:
    """By which a study or training that is done writes its model again."""
    folder = tmp_path / "copy"
    assert not is_sound(folder)
    for name, damage in [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("model.safetensors", Path.unlink),
        ("model.yaml", lambda path: path.write_text(path.read_text()[:-80])),
        ("model.yaml", Path.unlink),
    ]:
        shutil.copytree(winner, folder)
        assert is_sound(folder)
        damage(folder / name)
        assert not is_sound(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("test_vit", "head"),
        ("test_resnet", "fc"),
        ("test_convnext", "head.fc"),
        ("deit_tiny_distilled_patch16_224", None),  # two classifiers
    ],
)
def test_timm_layout__gives_the_same_logits(name: str, last: str | None) -> None:
    encoder = create_encoder(name, size := 160 if name.startswith("test") else 224)
    width = encoder.num_features
    state = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    state |= {"head.weight": torch.randn(5, width), "head.bias": torch.randn(5)}
    layout = timm_layout(name, size, state)
    assert (layout and layout.classifier) == last
    if layout is not None:
        images = torch.randn(3, 3, size, size)
        with torch.inference_mode():
            wanted, found = classifier(name, size, state)(images), layout.model(images)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert layout.tensors.keys() == to_timm(state, layout.classifier).keys()
