"""Exported models: one file each (ONNX, pt2, safetensors) that holds all that a model needs.

Beside the weights a file holds three texts in JSON: ``class_names``, in the order of the outputs;
``preprocessing``, from an RGB image to the input; and ``model``, its architecture and origin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.pixels import WhiteValues
from drtune_ray.data.views import Normalization
from drtune_ray.errors import DrtuneError, EnvironmentProblem, first_line
from drtune_ray.results.package import from_timm
from drtune_ray.results.pt2_check import check_pt2
from drtune_ray.results.winner import Winner, read_normalization
from drtune_ray.training.model import classifier

ONNX, PT2, SAFETENSORS = ".onnx", ".pt2", ".safetensors"
SUFFIXES = (ONNX, PT2, SAFETENSORS)
INPUT, OUTPUT = "images", "logits"
CLASS_NAMES, PREPROCESSING, MODEL = "class_names", "preprocessing", "model"
KEYS = (CLASS_NAMES, PREPROCESSING, MODEL)
TENSORS_ALONE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # of PyTorch
Texts = dict[str, str]


def is_exported(path: Path) -> bool:
    """Return whether a path is that of an exported model, by its suffix."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def texts_of(winner: Winner, timm_classifier: str | None = None, **more: Any) -> Texts:
    """Return what travels with the weights.

    Args:
        winner: The model.
        timm_classifier: Name of the last layer where the weights have timm's names.
        more: Further facts about the model.
    """
    data = winner.trial.data
    preprocessing = {
        "image_size": data.image_size,
        "resize": data.evaluation_resize,
        "crop_fraction": data.crop_fraction,
        **asdict(winner.normalization),
        "white_values": asdict(winner.whites),
    }
    model = {
        "architecture": winner.trial.backbone.name,
        "classifier": timm_classifier,
        "input": f"{INPUT}: RGB of 0 to 1, minus mean, over std; float32 (batch, 3, side, side)",
        "output": f"{OUTPUT}: float32 (batch, classes); softmax gives probabilities",
        "about": winner.about,
        **more,
    }
    return {
        CLASS_NAMES: json.dumps(winner.classes),
        PREPROCESSING: json.dumps(preprocessing),
        MODEL: json.dumps(model),
    }


def read_exported(path: Path) -> Winner:
    """Load an exported model.

    Raises:
        EnvironmentProblem: If the file is damaged, was not written by `export`, or needs packages
            that are not installed.
    """
    readers: dict[str, Callable[[Path], tuple[nn.Module | dict[str, Tensor], Texts]]] = {
        ONNX: _read_onnx,
        PT2: _read_pt2,
        SAFETENSORS: _read_safetensors,
    }
    try:
        weights, texts = readers[path.suffix.lower()](path)
        return _winner(weights, texts)
    except DrtuneError:
        raise
    except Exception as error:  # the runtimes raise errors of many types at damaged files
        raise EnvironmentProblem(
            f"{path} is damaged, or was not written by `drtune-ray export` ({first_line(error)}): "
            "export the model again"
        ) from None


def _winner(weights: nn.Module | Mapping[str, Tensor], texts: Texts) -> Winner:
    about, steps = json.loads(texts[MODEL]), json.loads(texts[PREPROCESSING])
    classes = tuple(json.loads(texts[CLASS_NAMES]))
    trial = TrialConfig.from_mapping(
        {
            # Of the training only what decides the pixels is in the file.
            "data": {
                "train": "",
                "image_size": steps["image_size"],
                "evaluation_resize": steps["resize"],
                "crop_fraction": steps["crop_fraction"],
            },
            "backbone": {"name": about["architecture"]},
        }
    )
    if isinstance(weights, nn.Module):
        model = weights
    else:
        last = about["classifier"]
        state = dict(weights) if last is None else from_timm(weights, last)
        model = classifier(trial.backbone.name, trial.data.image_size, state)
    normalization: Normalization = read_normalization(steps)
    whites = WhiteValues(**steps["white_values"])
    return Winner(model.eval(), classes, normalization, trial, about["about"], whites)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Texts]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata() or {}
    if not found.keys() >= set(KEYS):
        raise SafetensorError("it lacks class names and preprocessing")
    return safetensors.torch.load_file(path), {key: found[key] for key in KEYS}


def _read_pt2(path: Path) -> tuple[nn.Module, Texts]:
    texts = dict.fromkeys(KEYS, "")
    check_pt2(path)
    with _nothing_unpickled():
        program = torch.export.load(path, extra_files=texts)
    module: Any = program.module()
    return _Graph(module), texts


@contextmanager
def _nothing_unpickled() -> Iterator[None]:
    """Let torch.load, which torch.export.load calls, read tensors alone."""
    former = os.environ.get(TENSORS_ALONE)
    os.environ[TENSORS_ALONE] = "1"
    try:
        yield
    finally:
        if former is None:
            del os.environ[TENSORS_ALONE]
        else:
            os.environ[TENSORS_ALONE] = former


def _read_onnx(path: Path) -> tuple[nn.Module, Texts]:
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.get_modelmeta().custom_metadata_map
    return _OnnxModel(session), {key: found[key] for key in KEYS}


class _Graph(nn.Module):
    """A graph of torch.export, which refuses `eval` but has no other mode."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def train(self, mode: bool = True) -> _Graph:
        return self

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.graph(images.contiguous())
        return logits


class _OnnxModel(nn.Module):
    """A model that ONNX Runtime runs on the CPU."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self._session = session

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self._session.run([OUTPUT], {INPUT: images.cpu().contiguous().numpy()})
        return torch.from_numpy(logits)


def import_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        EnvironmentProblem: If it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise EnvironmentProblem(
            "ONNX needs further packages: pip install 'drtune-ray[export]'"
        ) from None
    return onnxruntime
