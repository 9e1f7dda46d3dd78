"""Write a model as one file for other runtimes, after comparing it with the model itself."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from drtune_ray.errors import ConfigError, DrtuneError, EnvironmentProblem, first_line
from drtune_ray.folders import atomic_write
from drtune_ray.results.exported import (
    INPUT,
    ONNX,
    OUTPUT,
    PT2,
    SAFETENSORS,
    Texts,
    import_onnxruntime,
    read_exported,
    texts_of,
)
from drtune_ray.results.inference import Classifier
from drtune_ray.results.package import TOLERANCE, timm_layout
from drtune_ray.results.quantize import quantized
from drtune_ray.results.study_images import StudyImages
from drtune_ray.results.winner import Winner

FORMATS = {"onnx": ONNX, "pt2": PT2, "safetensors": SAFETENSORS}
NUM_CHECKED = 64
MAX_PROTOBUF_BYTES = 2**31 - 1


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        path: The file.
        num_checked: Number of real images on which it was compared with the model.
        max_difference: Largest difference of a probability on them.
        num_validated: Number of validation images, if their labels were compared too.
        num_correct: Number of them that the file classifies correctly.
        num_correct_before: Number of them that the model classifies correctly.
    """

    path: Path
    num_checked: int
    max_difference: float
    num_validated: int = 0
    num_correct: int = 0
    num_correct_before: int = 0


def export(winner: Winner, path: Path, images: Sequence[Image.Image]) -> Exported:
    """Write a model as ONNX, pt2 or safetensors, by the suffix of the path.

    The file appears once its probabilities for the images equal the model's to 1e-4, each image
    alone and all in one batch.

    Args:
        winner: The model, on the CPU.
        path: The file.
        images: Real RGB images.

    Raises:
        ConfigError: If the file cannot be written.
        DrtuneError: If the model cannot be converted, or the file gives other probabilities.
        EnvironmentProblem: If a package is missing.
    """

    def make(temporary: Path) -> Exported:
        _convert(winner, temporary)
        difference = _difference(winner, read_exported(temporary), images)
        return Exported(path, len(images), difference)

    return _published(path, make)


def export_int8(winner: Winner, path: Path, images: StudyImages) -> Exported:
    """Write a model as ONNX with weights and activations of 8 bits.

    The ranges of the activations are measured on training images. The validation images say what
    the rounding costs.

    Args:
        winner: The model, on the CPU.
        path: The file.
        images: Images of its study.

    Raises:
        DrtuneError: As `export` does.
    """

    def make(temporary: Path) -> Exported:
        whole = temporary.with_name(f"float{ONNX}")
        _convert(winner, whole)
        checked = [images.open(row) for row in images.validation[:NUM_CHECKED]]
        _difference(winner, read_exported(whole), checked)
        with _quiet():
            quantized(whole, temporary, winner, images)
        _write_texts(temporary, texts_of(winner, precision="int8"))
        return _validated(winner, read_exported(temporary), path, images)

    return _published(path, make)


def _published(path: Path, make: Callable[[Path], Exported]) -> Exported:
    """Make a file in a folder of its own, and move it to its place once it was checked."""
    made: list[Exported] = []

    def fill(temporary: Path) -> None:
        # The runtimes know a file by its suffix, which a temporary one lacks.
        with tempfile.TemporaryDirectory(dir=temporary.parent, prefix=".export-") as folder:
            file = Path(folder, path.name)
            made.append(make(file))
            file.replace(temporary)

    with _as_message(path):
        atomic_write(path, fill)
    return made[0]


def _validated(winner: Winner, other: Winner, path: Path, images: StudyImages) -> Exported:
    rows = images.validation
    labels = torch.tensor([row["label"] for row in rows])
    before, after = (images.logits(Classifier(each, "cpu"), rows) for each in (winner, other))
    num_before, num_after = (int((each.argmax(1) == labels).sum()) for each in (before, after))
    difference = float((before.softmax(1) - after.softmax(1)).abs().max())
    return Exported(path, len(rows), difference, len(rows), num_after, num_before)


@contextmanager
def _as_message(path: Path) -> Iterator[None]:
    """Turn what a converter raises into one message.

    Raises:
        ConfigError: If the file cannot be written.
        DrtuneError: If the model cannot be converted.
    """
    try:
        yield
    except DrtuneError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}): give another --output"
        ) from None
    except Exception as error:  # converters raise errors of many types
        raise DrtuneError(
            f"this model cannot be written as {path.suffix[1:]} ({first_line(error)}): try another "
            f"of the formats {', '.join(FORMATS)}"
        ) from error


def _convert(winner: Winner, path: Path) -> None:
    with _quiet():
        {ONNX: _write_onnx, PT2: _write_pt2, SAFETENSORS: _write_safetensors}[path.suffix](
            winner, path
        )


def _write_safetensors(winner: Winner, path: Path) -> None:
    trial, state = winner.trial, winner.model.state_dict()
    layout = timm_layout(trial.backbone.name, trial.data.image_size, state)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    texts = texts_of(winner, layout.classifier if layout else None)
    path.write_bytes(safetensors.torch.save(layout.tensors if layout else tensors, texts))


def _write_pt2(winner: Winner, path: Path) -> None:
    model, images, shapes = _traced(winner)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files=dict(texts_of(winner)))


def _write_onnx(winner: Winner, path: Path) -> None:
    import_onnxruntime()
    num_bytes = sum(t.nbytes for t in winner.model.state_dict().values())
    if num_bytes > MAX_PROTOBUF_BYTES:
        raise EnvironmentProblem(
            f"ONNX holds at most 2 GiB in one file, and the weights have {num_bytes / 2**30:.1f}: "
            "export --to pt2 or safetensors"
        )
    model, images, shapes = _traced(winner)
    program: Any = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    program.save(path, external_data=False)
    _write_texts(path, texts_of(winner))


def _write_texts(path: Path, texts: Texts) -> None:
    """Write the texts into the metadata of an ONNX file."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, path)


def _traced(winner: Winner) -> tuple[Any, Tensor, tuple[Any, ...]]:
    """Return what is traced: the model, images for it, and that their number may vary."""
    size = winner.trial.data.image_size
    model = winner.model.eval().to(memory_format=torch.contiguous_format)
    return model, torch.zeros(2, 3, size, size), ({0: torch.export.Dim("batch")},)


def _difference(winner: Winner, other: Winner, images: Sequence[Image.Image]) -> float:
    """Return the largest difference of a probability, whatever the size of the batch.

    Raises:
        DrtuneError: If it is above the tolerance.
    """
    items = [*images, images[0]]  # two at least
    differences = []
    for size in (1, len(items)):
        wanted, found = (_probabilities(each, items, size) for each in (winner, other))
        differences.append(float((wanted - found).abs().max()))
    if not max(differences) <= TOLERANCE:  # NaN included
        raise DrtuneError(
            f"the exported model's probabilities differ from the model's by {max(differences):.2g} "
            f"on {len(images)} images: it is not written; try another format"
        )
    return max(differences)


def _probabilities(winner: Winner, images: Sequence[Image.Image], size: int) -> Tensor:
    found = Classifier(winner, "cpu", size).logits(images, lambda image: image)
    return torch.cat([logits for _, logits in found]).softmax(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what converters report about their own insides."""
    names = ("onnxscript", "onnx_ir", "torch.onnx")
    loggers = {name: logging.getLogger(name) for name in names}
    former = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(former[name])
