"""Small finished studies of released numeric versions, kept in tests/studies.

``python -m tests.past_studies`` writes that of the present version; run it when `NUMERIC_VERSION`
is raised, and keep the former ones. A study is one folder, as it is under the storage, without
``mlflow.db`` and tables; HERE stands for the folder that holds images, weights and storage.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image

from drtune_ray.config.study import StudyConfig
from drtune_ray.results.winner import SEAL
from drtune_ray.storage.fingerprint import NUMERIC_VERSION
from drtune_ray.study.run import run_study
from drtune_ray.values import nested

FIXTURES = Path(__file__).parent / "studies"
HERE = b"@HERE@"
NAME, BACKBONE = "small", "test_efficientnet"
COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 50, 50)}
LEFT_OUT = {
    "driver.lock",
    "driver.txt",
    "trials.parquet",
    "epochs.parquet",
    "inputs",
    "report.html",
}
BINARY = {".ckpt", ".safetensors", ".parquet"}  # without paths


def write_inputs(here: Path) -> None:
    """Write images and weights, the same bytes with any version of any package."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (here / "images" / name).mkdir(parents=True)
        for index in range(8):
            pixels = np.clip(np.array(colour) + random.normal(0, 70, (24, 24, 3)), 0, 255)
            picture = Image.fromarray(pixels.astype(np.uint8))
            picture.save(here / "images" / name / f"{index}.bmp")
    state = timm.create_model(BACKBONE, num_classes=3).state_dict()
    for name, tensor in sorted(state.items()):
        if tensor.is_floating_point():
            values = torch.from_numpy(random.normal(0, 0.2, tensor.shape).astype(np.float32))
            state[name] = values.abs() + 0.5 if "running_var" in name else values
    safetensors.torch.save_file(state, here / "weights.safetensors")


def config_in(here: Path, **changes: Any) -> StudyConfig:
    """The study, of two trials of a second."""
    trial = {
        "data.train": str(here / "images"),
        "data.image_size": 32,
        "data.views": 1,
        "backbone.name": BACKBONE,
        "backbone.weights": str(here / "weights.safetensors"),
        "training.epochs": 2,
        "training.batch_size": 6,
        "method.bank_size": 12,
        "optim.backbone_lr": 0.01,
    }
    space = {"parameters": {"optim.backbone_lr": {"float": [0.001, 0.02], "log": True}}}
    values = {
        "name": NAME,
        "storage": str(here / "storage"),
        "trials": 2,
        "reference_trials": ["ce_tuning"],
        "finalists": {"num_seeds": 0},
        "scheduler": {"name": "none"},
        "space": space,
        "trial": nested(trial),
    }
    return StudyConfig.from_mapping(values | changes)


def install(here: Path, version: int = NUMERIC_VERSION) -> Path:
    """Put the study of a version, with its inputs, into a folder; return the study's folder."""
    write_inputs(here)
    folder = here / "storage" / NAME
    shutil.copytree(FIXTURES / f"numeric-{version}", folder)
    replace_text(folder, HERE, str(here).encode())
    return folder


def replace_text(folder: Path, old: bytes, new: bytes) -> None:
    """Replace a text in all text files of a study, all of whose events were sent."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in BINARY:
            path.write_bytes(path.read_bytes().replace(old, new))
    card = folder / "winner" / "model.yaml"
    text, seal, _ = card.read_text().partition(SEAL)
    if seal:  # version 2 has none
        card.write_text(f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n")
    for name, mark in (("events.jsonl", "sent"), ("files.jsonl", "files-sent")):  # bytes
        (folder / "spool" / mark).write_text(str((folder / "spool" / name).stat().st_size))


def _make() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        write_inputs(here)
        result = run_study(config_in(here, tracking={"num_top_checkpoints": 0}))
        kept = FIXTURES / f"numeric-{NUMERIC_VERSION}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(result.folder, kept, ignore=lambda _, names: LEFT_OUT & set(names))
        replace_text(kept, str(here).encode(), HERE)


if __name__ == "__main__":
    _make()
