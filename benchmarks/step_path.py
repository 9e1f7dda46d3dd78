"""Time what a trial does beside forward and backward passes, each in two ways in turn.

    .venv/bin/python benchmarks/step_path.py    # half a minute on two cores

checkpoint   what the end of an epoch waits for: writing the checkpoint, or copying its state for a
             thread that writes it (a transformer with AdamW: weights and two moments)
optimiser    PyTorch's default loop over tensors on a CPU, or its fused kernel
evaluation   reading, decoding and resizing the test images one by one, or in threads a batch ahead

A ratio is the first way divided by the second, from medians over turns. Optimiser: seconds of the
processor with one thread, which other programs on the machine hardly change; checkpoint and
evaluation: seconds by the clock.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from report import describe_machine

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.pixels import decode
from drtune_ray.data.views import ViewMaker
from drtune_ray.results.inference import in_batches
from drtune_ray.training.checkpoint import TrialFolder, copied

TURNS = 9


def compare(
    what: str,
    first: Callable[[], Any],
    second: Callable[[], Any],
    turns: int,
    clock: Callable[[], float] = time.process_time,
) -> None:
    """Print the medians of two ways and their ratio."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for way, found in zip((first, second), seconds, strict=True):
            started = clock()
            way()
            if turn:  # the first is no measurement
                found.append(clock() - started)
    slow, fast = map(statistics.median, seconds)
    print(f"{what:<44} {slow:8.3f} s {fast:8.3f} s   ratio {slow / fast:.2f}", flush=True)


def checkpoints(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"method": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    size = 3 * 4 * sum(parameter.numel() for parameter in model.parameters()) / 2**20
    with tempfile.TemporaryDirectory() as path:
        folder = TrialFolder(Path(path))
        compare(
            f"checkpoint: {name}, {size:.0f} MiB",
            lambda: folder.save(state, 1, 0),
            lambda: copied(state),
            3,
            time.perf_counter,
        )


def optimizers(name: str) -> None:
    for kind, options in (("SGD", {"momentum": 0.9}), ("AdamW", {})):
        ways = []
        for fused in (False, True):
            model = timm.create_model(name, num_classes=0)
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1e-3)
            ways.append(getattr(torch.optim, kind)(model.parameters(), fused=fused, **options).step)
        compare(f"optimiser: {kind}, {name}", ways[0], ways[1], TURNS)


def evaluation(num_images: int) -> None:
    maker = ViewMaker(DataConfig(train="unused"), "bicubic")
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((640, 480)).save(buffer, "JPEG")
    rows = [{"content": buffer.getvalue()}] * num_images

    def view(row: dict[str, Any]) -> torch.Tensor:
        return torch.tensor(maker.evaluation_view(decode(row["content"])))

    compare(
        f"evaluation: {num_images} pictures of 640 x 480",
        lambda: [view(row) for row in rows],
        lambda: list(in_batches(view, rows, 64)),
        3,
        time.perf_counter,
    )


def main() -> None:
    torch.set_num_threads(1)
    print(describe_machine("benchmarks/step_path.py"))
    checkpoints("vit_small_patch16_224")
    for name in ("tf_efficientnet_lite0", "vit_small_patch16_224"):
        optimizers(name)
    evaluation(256)


if __name__ == "__main__":
    main()
