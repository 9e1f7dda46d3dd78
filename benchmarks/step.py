"""Time a DR-Tune step beside a CE-tuning step of the same backbone, and its parts.

    .venv/bin/python benchmarks/step.py           # about ten minutes on two cores
    .venv/bin/python benchmarks/step.py --quick   # EfficientNet-Lite0 with ten classes

Full training steps (forward, backward, SGD with momentum, frozen BatchNorm, channels last) of the
shipped default with K = 2048 and batches of 64, on random images. CE-tuning, DR-Tune with cached
frozen features and DR-Tune with the live frozen encoder take their steps in turn. A figure combines
two medians, of the steps that refresh the rotation and of the others, weighted as they occur.
Ratios are DR-Tune / CE-tuning. The parts are means over a further rotation interval.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timm
import torch
from report import describe_machine
from torch import Tensor

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.views import Normalization
from drtune_ray.method import DRTune, Method
from drtune_ray.training.backbones import Backbone
from drtune_ray.training.model import build_method, set_training_mode
from drtune_ray.training.optim import build_optimizer

BANK, BATCH = 2048, 64
CASES = [  # backbone, side, classes, turns
    ("tf_efficientnet_lite0", 64, 10, 7),
    ("tf_efficientnet_lite0", 64, 38, 7),
    ("tf_efficientnet_lite0", 64, 200, 7),
    ("resnet50", 128, 10, 2),
]
CE, CACHED, LIVE = "CE-tuning", "cached", "live"


def random_backbone(name: str, side: int) -> Backbone:
    """Return a timm model with its initial weights: a step costs the same with any weights."""
    encoder = timm.create_model(name, num_classes=0)
    normalization = Normalization((0.5,) * 3, (0.5,) * 3)
    return Backbone(name, side, encoder.num_features, normalization, encoder.state_dict())


class Contender:
    """One method with its optimiser, taking steps on the batches it is given."""

    def __init__(
        self, kind: str, backbone: Backbone, num_classes: int, bank_size: int = BANK
    ) -> None:
        method = "ce_tuning" if kind == CE else "dr_tune"
        config = TrialConfig.from_mapping(
            {"data": {"train": "unused"}, "method": {"name": method, "bank_size": bank_size}}
        )
        self.kind, self.interval = kind, config.method.calibration.rotation_interval
        self.method: Method = build_method(config, backbone, num_classes, bank_size, kind == LIVE)
        self.method = self.method.to(memory_format=torch.channels_last)
        set_training_mode(self.method, "frozen")
        self.optimizer = build_optimizer(
            self.method.downstream_encoder, self.method.head, config.optim, 1.0
        )
        if isinstance(self.method, DRTune):
            generator = torch.Generator().manual_seed(1)
            features = torch.rand(bank_size, backbone.num_features, generator=generator)
            labels = torch.randint(num_classes, (bank_size,), generator=generator)
            self.method.bank.enqueue(features, features.flip(1), labels)

    def step(self, images: Tensor, labels: Tensor, features: Tensor) -> float:
        """Take a step and return its seconds."""
        started = time.perf_counter()
        output = self.method(images, labels, features if self.kind == CACHED else None)
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        self.optimizer.step()
        return time.perf_counter() - started


def typical(seconds: list[float], interval: int) -> float:
    """Return mean seconds a step, from medians: one step in `interval`, the first, refreshes R."""
    refreshing = statistics.median(seconds[::interval])
    others = statistics.median(s for i, s in enumerate(seconds) if i % interval)
    return (refreshing + (interval - 1) * others) / interval


class PartTimer:
    """Return the seconds of the calls that a contender makes, by the name given to each."""

    def __init__(self, contender: Contender) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        method = contender.method
        self.wrap("encoder forward", method.downstream_encoder, "forward")
        self.wrap("optimiser", contender.optimizer, "step")
        self.wrap("all but backward and optimiser", method, "forward")
        if isinstance(method, DRTune):
            self.wrap("  bank enqueue", method, "enqueue_batch")
            self.wrap("  DR loss with calibration", method, "_regularization")
            self.wrap("    of it calibration", method.calibration, "forward")
            self.wrap("      of it rotation refresh", method.calibration, "_refresh")
            if method.pretrained_encoder is not None:
                self.wrap("  frozen encoder", method.pretrained_encoder, "forward")

    def wrap(self, part: str, owner: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - started
            return result

        setattr(owner, name, timed)

    def lines(self, num_steps: int, total: float) -> list[str]:
        rows = self.seconds.items()
        return [f"    {part:34}{1e3 * s / num_steps:9.1f} ms{s / total:8.1%}" for part, s in rows]


def compare(name: str, side: int, num_classes: int, turns: int) -> None:
    backbone = random_backbone(name, side)
    contenders = [Contender(kind, backbone, num_classes) for kind in (CE, CACHED, LIVE)]
    interval = contenders[0].interval
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(BATCH, 3, side, side, generator=generator)
    labels = torch.randint(num_classes, (BATCH,), generator=generator)
    features = torch.rand(BATCH, backbone.num_features, generator=generator)
    batch = images.to(memory_format=torch.channels_last), labels, features
    seconds: dict[str, list[float]] = defaultdict(list)
    for step in range((turns + 1) * interval):
        for contender in contenders:
            taken = contender.step(*batch)
            if step >= interval:  # the first turn warms up
                seconds[contender.kind].append(taken)
    means = {kind: typical(values, interval) for kind, values in seconds.items()}
    print(
        f"{name} {side} px, B {BATCH}, K {BANK}, D {backbone.num_features}, C {num_classes}: "
        + ", ".join(f"{kind} {1e3 * s:.0f} ms" for kind, s in means.items())
    )
    for kind in (CACHED, LIVE):
        print(f"  {kind:7} / {CE}: {means[kind] / means[CE]:.3f}")
    for contender in contenders[1:]:
        timer = PartTimer(contender)
        taken = sum(contender.step(*batch) for _ in range(interval))
        print(f"  parts of a step, {contender.kind}:")
        print("\n".join(timer.lines(interval, taken)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first case only")
    cases = CASES[:1] if parser.parse_args().quick else CASES
    torch.set_num_threads(2)
    print(describe_machine("benchmarks/step.py"))
    for case in cases:
        compare(*case)


if __name__ == "__main__":
    main()
