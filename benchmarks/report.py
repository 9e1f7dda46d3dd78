"""The first lines of every benchmark: its command, the machine and the versions."""

from __future__ import annotations

import os
import platform

import timm
import torch


def describe_machine(command: str) -> str:
    return (
        f"command: .venv/bin/python {command}\n"
        f"machine: {len(os.sched_getaffinity(0))} cores ({processor()}), "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, timm {timm.__version__}"
    )


def processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
