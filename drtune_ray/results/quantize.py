"""ONNX models with weights and activations of 8 bits, by ONNX Runtime's static quantization."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from drtune_ray.data.views import ViewMaker
from drtune_ray.results.exported import INPUT, import_onnxruntime
from drtune_ray.results.study_images import StudyImages
from drtune_ray.results.winner import Winner
from drtune_ray.training.frozen_features import Normalizer

NUM_CALIBRATED = 256
ROWS = 16


def quantized(source: Path, target: Path, winner: Winner, images: StudyImages) -> None:
    """Write the 8-bit version of an ONNX model.

    Args:
        source: The model in float32.
        target: Receives the model with operators in the QDQ format.
        winner: The same model, for its preprocessing.
        images: Images whose training part gives the ranges of the activations.
    """
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = _batches(winner, images)

        def get_next(self) -> dict[str, Any] | None:
            found = next(self._batches, None)
            return None if found is None else {INPUT: found}

    prepared = source.with_name(f"prepared-{source.name}")
    quant_pre_process(source, prepared)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it warns of each one-dimensional weight
    try:
        # Seven bits a weight: with eight, sums overflow on CPUs without VNNI.
        quantize_static(prepared, target, Reader(), per_channel=True, reduce_range=True)
    finally:
        root.setLevel(level)


def _batches(winner: Winner, images: StudyImages) -> Iterator[NDArray[Any]]:
    """Yield normalised training images (B, 3, S, S), spread over the classes."""
    views = ViewMaker(winner.trial.data, winner.normalization.interpolation)
    normalizer = Normalizer(winner.normalization, torch.device("cpu"))
    rows = images.training
    step = max(1, len(rows) // NUM_CALIBRATED)
    rest = iter(rows[::step][:NUM_CALIBRATED])
    while part := list(islice(rest, ROWS)):
        pixels = [torch.tensor(views.evaluation_view(images.open(row))) for row in part]
        yield normalizer(torch.stack(pixels)).contiguous().numpy()
