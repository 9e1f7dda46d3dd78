"""Measure the peak memory of DR-Tune trials over that of CE-tuning, and what the design allows.

    .venv/bin/python benchmarks/memory.py

Each trial takes twelve steps (two refreshes of the rotation) in a fresh process; the peak is the
kernel's (VmHWM). Allowed over CE-tuning: 4 K D + 4 K C + D^2 floats and 64 MB, and with the live
encoder its weights too. The smaller the ratio of measured to allowed, the better.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from report import describe_machine
from step import CACHED, CE, LIVE, Contender, random_backbone

BATCH, STEPS, FLOAT, MEGABYTE = 32, 12, 4, 1e6
CASES = [  # backbone, side, K, C
    ("tf_efficientnet_lite0", 64, 2048, 38),
    ("tf_efficientnet_lite0", 64, 8192, 200),
    ("resnet50", 64, 8192, 1000),
]
Case = tuple[str, int, int, int]


def run(kind: str, case: Case) -> None:
    """Train in this process, then print its peak in bytes and the encoder's size."""
    torch.set_num_threads(2)
    name, side, bank_size, num_classes = case
    backbone = random_backbone(name, side)
    contender = Contender(kind, backbone, num_classes, bank_size)
    images = torch.rand(BATCH, 3, side, side).to(memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (BATCH,))
    features = torch.rand(BATCH, backbone.num_features)
    for _ in range(STEPS):
        contender.step(images, labels, features)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    weights = sum(tensor.nbytes for tensor in backbone.state.values())
    print(json.dumps([peak, weights, backbone.num_features]))


def measured(kind: str, case: Case) -> tuple[int, int, int]:
    command = [sys.executable, __file__, kind, json.dumps(case)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, weights, num_features = json.loads(output)
    return peak, weights, num_features


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", nargs="*", help="the trial of a fresh process: its kind and case")
    if given := parser.parse_args().case:
        kind, case = given
        run(kind, tuple(json.loads(case)))
        return
    print(describe_machine("benchmarks/memory.py"))
    print(f"{'':38}   CE-tuning    over it   allowed   ratio   (MB)")
    for case in CASES:
        base, weights, num_features = measured(CE, case)
        name, side, bank_size, num_classes = case
        floats = 4 * bank_size * (num_features + num_classes) + num_features**2
        for kind in (CACHED, LIVE):
            allowed = FLOAT * floats + 64 * MEGABYTE + (weights if kind == LIVE else 0)
            over = measured(kind, case)[0] - base
            label = f"{name} K {bank_size} C {num_classes} {kind}"
            print(
                f"{label:46}{base / MEGABYTE:7.0f}{over / MEGABYTE:10.0f}"
                f"{allowed / MEGABYTE:10.0f}{over / allowed:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
