"""Time a DR-Tune step on one and on two processes, and estimate it for W devices.

    .venv/bin/python benchmarks/scaling.py           # about five minutes on two cores
    .venv/bin/python benchmarks/scaling.py --quick   # one size of the bank
    .venv/bin/python benchmarks/scaling.py --flops 1e14 --bandwidth 1e11   # the formula only

One process takes steps on the whole batch, and two take steps on halves of it, in turn in one run,
with one thread each, over gloo. The steps are full training steps of the shipped default with
cached frozen features. Time within the method's collectives counts as communication, including the
wait for the other process; communication of the gradients is the difference from steps that do not
exchange them. The parts that are linear in K are calibration and DR loss, forward and backward,
without the solve of R, which one process does for all. The floats that a step sends are counted and
compared with `floats_per_step`.

With --flops (a device's sustained operations a second) and --bandwidth (bytes a second between two
devices), which the user gives, the formula estimates a step divided among W devices. It is
arithmetic on these two numbers and on counted operations, not a measurement: it leaves out
element-wise work, memory traffic, data loading and the overlap of communication with the backward
pass.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from report import describe_machine
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from drtune_ray.config.method import CalibrationConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.views import Normalization
from drtune_ray.method import DRTune
from drtune_ray.method.collective import Collective
from drtune_ray.training.backbones import Backbone
from drtune_ray.training.distributed import ProcessGroup, data_parallel
from drtune_ray.training.model import build_method, set_training_mode
from drtune_ray.training.optim import build_optimizer

BATCH, CLASSES, SIDE, BACKBONE = 64, 200, 64, "tf_efficientnet_lite0"
BANKS = (2048, 8192)
TURNS = 4
FLOAT_BYTES = 4
EXAMPLE = ("resnet50", 224, 256, 2048, 200)  # backbone, side, B, K, C
WORLD_SIZES = (1, 2, 4, 8, 16, 64)


@dataclass(frozen=True)
class Sizes:
    """B batch rows, K bank rows, D features, C classes, r rank, P trained parameters."""

    batch: int
    bank: int
    features: int
    classes: int
    rank: int
    parameters: int
    interval: int


def floats_per_step(
    sizes: Sizes, world_size: int, calibration: CalibrationConfig | None = None
) -> dict[str, float]:
    """Return the floats of each message of a step, as a process holds it when it is complete.

    None grows with K beyond min(B, K) rows. Those of R travel in one step of `interval`.
    """
    asked = calibration or CalibrationConfig()
    share = -(-min(sizes.batch, sizes.bank) // world_size)
    num_features, rank = sizes.features, min(sizes.rank, sizes.features)
    weighs = asked.translation and asked.confidence_weighting
    # Centring the pretrained rows, and again what they are moved to; a translation does both.
    num_means = 0 if asked.translation or not asked.rotation else 1 + asked.recenter
    solved = num_features**2 if asked.rotation_solver == "svd" else 2 * num_features * rank + 1
    return {
        "gradients": sizes.parameters,
        "rows of the bank": world_size * share * (2 * num_features + 1),
        "class translations": sizes.classes * num_features if asked.translation else 0,
        "softmax of the classes": 2 * sizes.classes * world_size if weighs else 0,
        "means of the rows": num_means
        * num_features
        / (1 if asked.rotation_kept else sizes.interval),
        "norms and flags": 3,
        "R": solved / sizes.interval if asked.rotation else 0,
    }


class CountingGroup(Collective):
    """A `Collective` that counts the floats and seconds of another."""

    def __init__(self, group: Collective) -> None:
        self._group = group
        self.rank, self.world_size = group.rank, group.world_size
        self.num_floats, self.seconds = 0, 0.0

    def sum(self, tensor: Tensor) -> Tensor:
        return self._timed(self._group.sum, tensor)

    def gather_rows(self, rows: Tensor, shares: Sequence[int]) -> Tensor:
        return self._timed(self._group.gather_rows, rows, shares)

    def broadcast(self, tensor: Tensor) -> Tensor:
        return self._timed(self._group.broadcast, tensor)

    def _timed(self, call: Callable[..., Tensor], *arguments: Any) -> Tensor:
        started = time.perf_counter()
        result = call(*arguments)
        self.seconds += time.perf_counter() - started
        self.num_floats += result.numel()
        return result


class Runner:
    """One method with its optimiser in this process: alone, or as one of several."""

    def __init__(self, backbone: Backbone, bank_size: int, num_classes: int, alone: bool) -> None:
        config = TrialConfig.from_mapping(
            {"data": {"train": "unused"}, "method": {"bank_size": bank_size}}
        )
        method = build_method(config, backbone, num_classes, bank_size, live_features=False)
        assert isinstance(method, DRTune) and method.calibration is not None
        self.group = CountingGroup(Collective() if alone else ProcessGroup())
        method.collective = self.group
        self.method = method.to(memory_format=torch.channels_last)
        set_training_mode(self.method, "frozen")
        self.interval = config.method.calibration.rotation_interval
        generator = torch.Generator().manual_seed(1)
        features = torch.rand(bank_size, backbone.num_features, generator=generator)
        labels = torch.randint(num_classes, (bank_size,), generator=generator)
        self.method.bank.enqueue(features, features.flip(1), labels)
        self.optimizer = build_optimizer(method.downstream_encoder, method.head, config.optim, 1.0)
        self.module: nn.Module = self.method
        if not alone:
            self.module = data_parallel(self.method, torch.device("cpu"))
        self.parts: dict[str, float] = defaultdict(float)
        self._time_parts()

    def step(self, batch: tuple[Tensor, ...], *, exchanges: bool = True) -> float:
        """Take a step on this process's part of the batch and return its seconds."""
        shares = [len(part) for part in batch[1].tensor_split(self.group.world_size)]
        start = sum(shares[: self.group.rank])
        own = [part[start : start + shares[self.group.rank]] for part in batch]
        started = time.perf_counter()
        alone = self.module is self.method
        with nullcontext() if exchanges or alone else self.module.no_sync():  # type: ignore[operator]
            output = self.module(*own, shares)
            self.optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
        self.optimizer.step()
        return time.perf_counter() - started

    def bank_part(self) -> float:
        """Return the seconds of calibration and DR loss, without the solve and the messages."""
        self.method.zero_grad()
        before, solving = self.group.seconds, self.parts["solve"]
        started = time.perf_counter()
        self.method._regularization(torch.ones(())).backward()
        taken = time.perf_counter() - started
        return taken - (self.group.seconds - before) - (self.parts["solve"] - solving)

    def _time_parts(self) -> None:
        calibration = self.method.calibration
        assert calibration is not None
        solve = calibration._solved

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = solve(*arguments)
            self.parts["solve"] += time.perf_counter() - started
            return result

        calibration._solved = timed  # type: ignore[method-assign]


def random_backbone(name: str, side: int) -> Backbone:
    """Return a timm model with its initial weights: a step costs the same with any weights."""
    torch.manual_seed(0)
    encoder = timm.create_model(name, num_classes=0)
    normalization = Normalization((0.5,) * 3, (0.5,) * 3)
    return Backbone(name, side, encoder.num_features, normalization, encoder.state_dict())


def random_batch(size: int, side: int, num_features: int, num_classes: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(size, 3, side, side, generator=generator)
    labels = torch.randint(num_classes, (size,), generator=generator)
    features = torch.rand(size, num_features, generator=generator)
    return images.to(memory_format=torch.channels_last), labels, features


def typical(seconds: list[float], interval: int) -> float:
    """Return mean seconds a step, from medians: one step in `interval`, the first, refreshes R."""
    refreshing = statistics.median(seconds[::interval])
    others = statistics.median(s for i, s in enumerate(seconds) if i % interval)
    return (refreshing + (interval - 1) * others) / interval


def measure(rank: int, world_size: int, group: str, banks: Sequence[int]) -> None:
    """Measure everything, in each process of a group; the first one prints it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=group, rank=rank, world_size=world_size)
    backbone = random_backbone(BACKBONE, SIDE)
    for bank_size in banks:
        lines = compare(backbone, bank_size, rank)
        if rank == 0:
            print("\n".join(lines), flush=True)
    dist.destroy_process_group()


def compare(backbone: Backbone, bank_size: int, rank: int) -> list[str]:
    batch = random_batch(BATCH, SIDE, backbone.num_features, CLASSES)
    alone = Runner(backbone, bank_size, CLASSES, alone=True)
    together = Runner(backbone, bank_size, CLASSES, alone=False)
    interval = alone.interval
    seconds: dict[str, list[float]] = defaultdict(list)
    for step in range((TURNS + 1) * interval):
        if step == interval:  # the first turn warms up
            together.group.num_floats, together.group.seconds = 0, 0.0
            alone.parts["solve"] = 0.0
        dist.barrier()
        if rank == 0:
            taken = alone.step(batch)
            seconds["alone"].append(taken) if step >= interval else None
        dist.barrier()
        taken = together.step(batch)
        seconds["together"].append(taken) if step >= interval else None
    num_steps = TURNS * interval
    counted, waited = together.group.num_floats / num_steps, together.group.seconds / num_steps
    solve = alone.parts["solve"] / num_steps if rank == 0 else 0.0
    without = []
    for _ in range(TURNS * interval):
        dist.barrier()
        without.append(together.step(batch, exchanges=False))
    bank_parts = _bank_parts(alone, together, rank)
    if rank:
        return []
    times = {name: typical(values, interval) for name, values in seconds.items()}
    parameters = sum(p.numel() for p in alone.method.parameters() if p.requires_grad)
    sizes = Sizes(BATCH, bank_size, backbone.num_features, CLASSES, 32, parameters, interval)
    gradients = max(0.0, times["together"] - typical(without, interval))
    return [
        f"{BACKBONE} {SIDE} px, B {BATCH}, K {bank_size}, D {sizes.features}, C {CLASSES}",
        f"  step: one process {1e3 * times['alone']:.0f} ms, two {1e3 * times['together']:.0f} ms; "
        f"ratio {times['together'] / times['alone']:.3f}",
        f"  communication: method {1e3 * waited:.1f} ms, gradients {1e3 * gradients:.1f} ms, "
        f"together {(waited + gradients) / times['together']:.1%} of a step",
        f"  parts linear in K: one process {1e3 * bank_parts['alone']:.1f} ms, each of two "
        f"{1e3 * bank_parts['together']:.1f} ms; "
        f"ratio {bank_parts['together'] / bank_parts['alone']:.3f}",
        f"  solve of R, which does not divide: {1e3 * solve:.1f} ms a step at interval {interval}, "
        f"{solve / times['alone']:.1%} of a step of one, {solve / times['together']:.1%} of two",
        *_float_lines(sizes, counted),
    ]


def _bank_parts(alone: Runner, together: Runner, rank: int) -> dict[str, float]:
    """Return medians of the parts linear in K, in turn; for two processes, the slower one's."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(5 * alone.interval):
        dist.barrier()
        if rank == 0:
            found["alone"].append(alone.bank_part())
        dist.barrier()
        found["together"].append(together.bank_part())
    slower = torch.tensor(statistics.median(found["together"]))
    dist.all_reduce(slower, op=dist.ReduceOp.MAX)
    first = statistics.median(found["alone"]) if rank == 0 else 0.0
    return {"alone": first, "together": float(slower)}


def _float_lines(sizes: Sizes, counted: float) -> list[str]:
    formula = floats_per_step(sizes, 2)
    own = sum(number for name, number in formula.items() if name != "gradients") - 2
    return [
        "  floats a step, by formula: " + ", ".join(f"{n} {v:,.0f}" for n, v in formula.items()),
        f"  counted in the method's messages {counted:,.0f}, by formula {own:,.0f} (without the "
        "gradients and the two flags)",
    ]


def operations(name: str, side: int, batch: int, bank: int, classes: int) -> dict[str, float]:
    """Count the floating-point operations of one process's step: encoder, bank, solve."""
    runner = Runner(random_backbone(name, side), bank, classes, alone=True)
    method, num_rows = runner.method, 2  # an encoder's operations are counted on two images
    images, labels, features = random_batch(num_rows, side, method.head.in_features, classes)
    bank_rows = method.bank.stored()[:2]
    counts = {}

    def encoder() -> None:
        method.head(method.downstream_encoder(images)).sum().backward()

    for part, call in (
        ("encoder", encoder),
        ("solve", lambda: runner.method.calibration._solved(*bank_rows)),  # type: ignore[union-attr]
        ("bank", lambda: method._regularization(torch.ones(())).backward()),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        counts[part] = float(counter.get_total_flops())
    counts["encoder"] *= batch / num_rows
    counts["bank"] -= counts["solve"]  # its first step refreshes R
    return counts


def predict(flops: float, bandwidth: float) -> list[str]:
    """Print how the example's step divides among W devices."""
    name, side, batch, bank, classes = EXAMPLE
    counts = operations(name, side, batch, bank, classes)
    encoder = timm.create_model(name, num_classes=classes)
    parameters = sum(p.numel() for p in encoder.parameters())
    sizes = Sizes(batch, bank, encoder.num_features, classes, 32, parameters, 10)
    lines = [
        f"{name} {side} px, B {batch} in all, K {bank}, D {sizes.features}, C {classes}; your "
        f"devices: {flops:g} operations/s, {bandwidth:g} bytes/s between two",
        "  operations a step: " + ", ".join(f"{part} {n:.3g}" for part, n in counts.items()),
        f"  {'W':>4}{'compute':>12}{'solve':>10}{'messages':>11}{'step':>10}{'speed-up':>10}",
    ]
    first = 0.0
    for world_size in WORLD_SIZES:
        compute = (counts["encoder"] + counts["bank"]) / world_size / flops
        solve = counts["solve"] / sizes.interval / flops
        messages = message_seconds(sizes, world_size, bandwidth)
        total = compute + solve + messages
        first = first or total
        lines.append(
            f"  {world_size:>4}{1e3 * compute:>9.2f} ms{1e3 * solve:>7.2f} ms"
            f"{1e3 * messages:>8.2f} ms{1e3 * total:>7.2f} ms{first / total:>10.2f}"
        )
    return lines


def message_seconds(sizes: Sizes, world_size: int, bandwidth: float) -> float:
    """Return the seconds of ring algorithms: a sum passes each float twice, others once."""
    if world_size == 1:
        return 0.0
    floats = floats_per_step(sizes, world_size)
    passed_once = ("rows of the bank", "softmax of the classes", "R")
    weighted = sum(n * (1 if name in passed_once else 2) for name, n in floats.items())
    return weighted * (world_size - 1) / world_size * FLOAT_BYTES / bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size of the bank")
    parser.add_argument("--flops", type=float, help="a device's sustained operations a second")
    parser.add_argument("--bandwidth", type=float, help="bytes a second between two devices")
    arguments = parser.parse_args()
    if (arguments.flops is None) != (arguments.bandwidth is None):
        parser.error("--flops and --bandwidth go together: give both")
    if arguments.flops is not None:
        print("\n".join(predict(arguments.flops, arguments.bandwidth)))
        return
    torch.set_num_threads(1)
    print(describe_machine("benchmarks/scaling.py") + " a process", flush=True)
    banks = BANKS[:1] if arguments.quick else BANKS
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (2, f"file://{folder}/group", banks), nprocs=2)


if __name__ == "__main__":
    main()
