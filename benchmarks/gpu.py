"""Time training steps on a GPU: ours beside a plain loop, DR-Tune beside CE-tuning.

    python benchmarks/gpu.py                             # ResNet-50 and ViT-B/16 at 224 px
    python benchmarks/gpu.py --trials 4                  # four trials that share the GPU
    python benchmarks/gpu.py --device cpu --model test_vit --size 160 --batch 4    # a trial run

It needs torch, timm and `drtune_ray.method`, which imports torch alone: no installation of the
project, so that it runs from a copy of the repository on any machine with a GPU.

plain      the loop of timm's train.py: autocast, cross-entropy, SGD with momentum
CE-tuning  the same model as this project trains it; the aim is 90 % of `plain`
cached     DR-Tune with frozen features that were computed once (`data.views` > 0)
live       DR-Tune with the frozen encoder at every step (`data.views: 0`)
compiled   the same with the frozen encoder under `torch.compile`

All take their steps in turn, on random images that lie on the device. A figure is the median of
windows of steps, each one rotation interval long, so that a refresh is in every window.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from drtune_ray.method import CETuning, DRTune, FeatureBank, SemanticCalibration  # noqa: E402

MODELS = ("resnet50", "vit_base_patch16_224")
CLASSES, BANK, INTERVAL, WINDOWS = 100, 2048, 10, 7
Step = Callable[[], None]


class Batch:
    """Random images on the device, with labels and pretrained features."""

    def __init__(self, size: int, rows: int, num_features: int, device: torch.device) -> None:
        images = torch.randn(rows, 3, size, size, device=device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(CLASSES, (rows,), device=device)
        self.features = torch.rand(rows, num_features, device=device)


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.001, momentum=0.9, weight_decay=1e-4, fused=True)


def stepping(module: nn.Module, loss_of: Callable[[], Tensor], device: torch.device) -> Step:
    """Return a function that takes one step under autocast in bfloat16."""
    optimizer = optimizer_of(module)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def plain(name: str, size: int, batch: Batch, device: torch.device) -> Step:
    model = on_device(create(name, size, CLASSES), device).train()
    return stepping(model, lambda: F.cross_entropy(model(batch.images), batch.labels), device)


def create(name: str, size: int, num_classes: int) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=num_classes, img_size=size)
    except TypeError:  # a convolutional model takes any size
        return timm.create_model(name, num_classes=num_classes)


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    return module.to(device).to(memory_format=torch.channels_last)


def ours(kind: str, name: str, size: int, batch: Batch, device: torch.device) -> Step:
    """Return the step of a method of this project, with a full bank."""
    encoder = create(name, size, 0)
    num_features = batch.features.shape[1]
    head = nn.Linear(num_features, CLASSES)
    if kind == "CE-tuning":
        method: nn.Module = CETuning(encoder, head)
    else:
        frozen = None if kind == "cached" else copy.deepcopy(encoder)
        bank = FeatureBank(BANK, num_features)
        calibration = SemanticCalibration(num_features, rotation_interval=INTERVAL)
        method = DRTune(encoder, head, bank, calibration, frozen)
    on_device(method, device).train()
    if isinstance(method, DRTune):
        if kind == "compiled":
            assert method.pretrained_encoder is not None
            method.pretrained_encoder.compile()
        rows = torch.rand(BANK, num_features, device=device)
        method.bank.enqueue(rows, rows.flip(1), torch.randint(CLASSES, (BANK,), device=device))
    known = batch.features if kind == "cached" else None
    return stepping(method, lambda: method(batch.images, batch.labels, known).loss, device)


def seconds_of(step: Step, device: torch.device) -> float:
    """Return the seconds of one window of steps."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(INTERVAL):
        step()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(name: str, size: int, rows: int, device: torch.device) -> None:
    """Print the images a second of each way, and the ratios."""
    num_features = create(name, size, 0).num_features
    batch = Batch(size, rows, int(num_features), device)  # type: ignore[arg-type]
    steps = {"plain": plain(name, size, batch, device)}
    for kind in ("CE-tuning", "cached", "live", "compiled"):
        steps[kind] = ours(kind, name, size, batch, device)
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for window in range(WINDOWS + 1):
        for kind, step in steps.items():
            found = seconds_of(step, device)
            if window:  # the first warms up
                seconds[kind].append(found)
    median = {kind: statistics.median(found) for kind, found in seconds.items()}
    print(f"{name} {size} px, B {rows}, K {BANK}, D {num_features}, C {CLASSES}")
    for kind, found in median.items():
        rate, beside = INTERVAL * rows / found, "plain" if kind == "CE-tuning" else "CE-tuning"
        ratio = "" if kind == "plain" else f"   {median[beside] / found:.2f} of {beside}"
        print(f"  {kind:<10}{rate:9.0f} images a second{ratio}", flush=True)


def share(rank: int, arguments: argparse.Namespace, start: object, rates: torch.Tensor) -> None:
    """Train one of several trials on the same device; store its images a second."""
    device = torch.device(arguments.device)
    name, size, rows = arguments.model or MODELS[0], arguments.size, arguments.batch
    batch = Batch(size, rows, int(create(name, size, 0).num_features), device)  # type: ignore[arg-type]
    step = ours("cached", name, size, batch, device)
    seconds_of(step, device)
    start.wait()  # type: ignore[attr-defined]
    found = statistics.median(seconds_of(step, device) for _ in range(WINDOWS))
    rates[rank] = INTERVAL * rows / found


def several(num_trials: int, arguments: argparse.Namespace) -> float:
    """Return the images a second of several trials together."""
    import torch.multiprocessing as processes

    context = processes.get_context("spawn")
    rates = torch.zeros(num_trials).share_memory_()
    start = context.Barrier(num_trials)
    processes.spawn(share, (arguments, start, rates), nprocs=num_trials)  # type: ignore[no-untyped-call]
    return float(rates.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", help=f"one of timm's models; default: {' and '.join(MODELS)}")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--trials", type=int, help="trials that share the device")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch has no CUDA device here: give --device cpu for a trial run")
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU: not run on a GPU"
    )
    print(f"{where}; torch {torch.__version__}, timm {timm.__version__}")
    if arguments.trials:
        alone, together = (several(number, arguments) for number in (1, arguments.trials))
        print(f"one trial {alone:.0f}, {arguments.trials} trials {together:.0f} images a second")
        print(f"together / alone: {together / alone:.2f}")
        return
    for name in [arguments.model] if arguments.model else MODELS:
        compare(name, arguments.size, arguments.batch, device)


if __name__ == "__main__":
    main()
