"""Cost of using a classifier: parameters, operations, and time for one image."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from drtune_ray.training.backbones import Backbone

NUM_WARM_UPS, NUM_RUNS = 5, 30


@torch.inference_mode()
def complexity(backbone: Backbone, num_classes: int, device: torch.device) -> dict[str, float]:
    """Measure an encoder with a linear head; its weights do not matter.

    Args:
        backbone: Pretrained encoder.
        num_classes: C, number of classes.
        device: Device on which the time is measured.

    Returns:
        ``num_parameters``; ``flops`` of one image, with a multiplication and an addition counted
        as two; ``latency_ms``, the median time for one image with torch's present threads.
    """
    head = nn.Linear(backbone.num_features, num_classes)
    model = nn.Sequential(backbone.build(), head).eval().to(device)
    size = backbone.image_size
    images = torch.zeros(1, 3, size, size, device=device)
    with FlopCounterMode(display=False) as counter:
        model(images)
    return {
        "num_parameters": float(sum(p.numel() for p in model.parameters())),
        "flops": float(counter.get_total_flops()),
        "latency_ms": _latency_ms(model, images),
    }


def _latency_ms(model: nn.Module, images: torch.Tensor) -> float:
    times = []
    for _ in range(NUM_WARM_UPS + NUM_RUNS):
        _wait_for(images.device)
        started = time.perf_counter()
        model(images)
        _wait_for(images.device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[NUM_WARM_UPS:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
