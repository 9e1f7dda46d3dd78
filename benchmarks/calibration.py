"""Measure what calibration adds to a step, beside the authors' procedure and the exact solver.

    .venv/bin/python benchmarks/calibration.py            # the table of docs/benchmarks.md
    .venv/bin/python benchmarks/calibration.py --quick    # only K = D = 2048, C = 200

The steps measured are those of DR: the head's loss on the whole bank, forward and backward. For
each way of calibrating,

    added = seconds of (calibration, loss on calibrated features, backward)
          - seconds of (loss on uncalibrated features, backward)

averaged over ten steps of a bank that takes 64 new rows a step. All ways run in turn, several
times; the median of the repeats counts. ``authors`` is the authors' procedure (rows b to e and n of
docs/method.md): full SVD and rotation on the first of the ten steps only, and a Python loop over
the classes. ``default`` rotates at every step and refreshes on the first of ten, ``refreshed`` at
each. The calibration alone is timed too, without any loss.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from report import describe_machine
from torch import Tensor
from torch.nn import functional as F

from drtune_ray.method import FeatureBank, SemanticCalibration

STEPS, BATCH, REPEATS, SMALL_REPEATS = 10, 64, 3, 5
MAIN = (2048, 2048, 200)
CASES = [
    MAIN,
    *((2048, features, 200) for features in (384, 768, 1280)),
    *((bank, 2048, 200) for bank in (256, 512, 1024, 4096, 8192)),
    *((2048, 2048, classes) for classes in (10, 38, 1000)),
    (2048, 1280, 10),
]
Way = Callable[["Inputs"], Tensor]


class Inputs:
    """A bank of drifting features in `num_classes` clusters, and a head."""

    def __init__(self, bank_size: int, num_features: int, num_classes: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.num_classes = num_classes
        self.centres = self._randn(num_classes, num_features)
        self.drift = 0.3 * self._randn(num_features, num_features) / num_features**0.5
        self.bank = FeatureBank(bank_size, num_features)
        self.enqueue(bank_size)
        self.weight = (0.1 * self._randn(num_classes, num_features)).requires_grad_()
        self.bias = torch.zeros(num_classes, requires_grad=True)

    def enqueue(self, num_rows: int = BATCH) -> None:
        labels = torch.randint(self.num_classes, (num_rows,), generator=self.generator)
        pretrained = self.centres[labels] + self._randn(num_rows, self.centres.shape[1])
        pretrained = pretrained.relu()  # pooled features are not negative
        self.bank.enqueue(pretrained, (pretrained + pretrained @ self.drift).relu(), labels)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


# ---- the ways


def uncalibrated(inputs: Inputs, step: int) -> Tensor:
    pretrained, _, labels = inputs.bank.stored()
    return F.cross_entropy(F.linear(pretrained, inputs.weight, inputs.bias), labels)


def authors(inputs: Inputs, step: int, *, alone: bool = False) -> Tensor:
    rows = authors_calibration(inputs, is_rotated=step % 10 == 0)
    if alone:
        return rows
    logits = F.linear(rows, inputs.weight, inputs.bias)
    return F.cross_entropy(logits, inputs.bank.stored()[2])


@torch.no_grad()
def authors_calibration(inputs: Inputs, is_rotated: bool) -> Tensor:
    pretrained, downstream, labels = inputs.bank.stored()
    pretrained, downstream = F.normalize(pretrained, dim=1), F.normalize(downstream, dim=1)
    prototypes = F.normalize(inputs.weight, dim=1)
    if is_rotated:
        source, target = pretrained - pretrained.mean(0), downstream - downstream.mean(0)
        left, _, right_t = torch.linalg.svd(source.T @ target)
        signs = torch.ones(len(left))
        signs[-1] = torch.sign(torch.linalg.det(right_t.T @ left.T))
        pretrained = source @ (left * signs) @ right_t
    calibrated = pretrained.clone()
    for c in range(inputs.num_classes):
        rows = (labels == c).nonzero().flatten()
        if len(rows) == 0:
            continue
        confidence = torch.softmax(downstream[rows] @ prototypes[c], 0)
        centre = (confidence.unsqueeze(1) * downstream[rows]).sum(0)
        calibrated[rows] = pretrained[rows] + centre - pretrained[rows].mean(0)
    return F.normalize(calibrated, dim=1) * 20.0


def ours(
    inputs: Inputs, step: int, *, calibration: SemanticCalibration, alone: bool = False
) -> Tensor:
    pretrained, downstream, labels = inputs.bank.stored()
    rows = calibration(pretrained, downstream, labels, inputs.weight, 20.0)
    if alone:
        return rows
    return F.cross_entropy(F.linear(rows, inputs.weight, inputs.bias), labels)


# ---- measuring


def seconds_a_step(inputs: Inputs, way: Callable[[Inputs, int], Tensor]) -> float:
    """Return the mean over ten steps, without the time of adding rows to the bank."""
    total = 0.0
    for step in range(STEPS):
        inputs.enqueue()
        started = time.perf_counter()
        result = way(inputs, step)
        if result.requires_grad:
            result.backward()
            inputs.weight.grad = inputs.bias.grad = None
        total += time.perf_counter() - started
    return total / STEPS


def measure(case: tuple[int, int, int]) -> dict[str, float]:
    bank_size, num_features, _ = case
    inputs = Inputs(*case)
    default = partial(ours, calibration=SemanticCalibration(num_features))
    every_step = partial(ours, calibration=SemanticCalibration(num_features, rotation_interval=1))
    ways: dict[str, Callable[[Inputs, int], Tensor]] = {
        "uncalibrated": uncalibrated,
        "authors": authors,
        "default": default,
        "refreshed": every_step,
        "authors alone": partial(authors, alone=True),
        "default alone": partial(default, alone=True),
        "refreshed alone": partial(every_step, alone=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            seconds[name].append(seconds_a_step(inputs, way))
    return {name: statistics.median(values) for name, values in seconds.items()}


def row(case: tuple[int, int, int], seconds: dict[str, float]) -> str:
    added = {
        name: 1e3 * (seconds[name] - seconds["uncalibrated"])
        for name in ("authors", "default", "refreshed")
    }
    alone = {name: 1e3 * seconds[f"{name} alone"] for name in added}
    ratios = [alone["authors"] / alone[name] for name in ("default", "refreshed")]
    added_ratio = f"{added['authors'] / added['default']:7.1f}"
    return (
        f"{case[0]:5}{case[1]:6}{case[2]:6}"
        f"{added['authors']:11.1f}{added['default']:9.1f}{added['refreshed']:10.1f}{added_ratio}"
        f"{alone['authors']:12.1f}{alone['default']:9.1f}{alone['refreshed']:10.1f}"
        f"{ratios[0]:9.1f}{ratios[1]:10.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size only")
    cases = [MAIN] if parser.parse_args().quick else CASES
    torch.set_num_threads(2)
    print(describe_machine("benchmarks/calibration.py"))
    print("milliseconds a step, mean over ten; ratios are authors / ours, higher is better")
    print(
        " " * 17 + "added to the step" + " " * 24 + "calibration alone" + " " * 17 + "ratio alone"
    )
    print(
        "    K     D     C    authors  default refreshed  ratio     authors  default refreshed"
        "  default refreshed"
    )
    for case in cases:
        print(row(case, measure(case)), flush=True)


if __name__ == "__main__":
    main()
