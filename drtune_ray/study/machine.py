"""The present machine, and defaults that fit it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from drtune_ray.config.demo_weights import DEMO_BACKBONE, has_demo_weights


@dataclass(frozen=True)
class Machine:
    """Numbers of CPUs that this process may use, and of CUDA devices."""

    num_cpus: int
    num_gpus: int

    def describe(self) -> str:
        """Return the numbers as a phrase."""
        gpus = f" and {self.num_gpus} GPUs" if self.num_gpus else ", no GPU"
        return f"{self.num_cpus} CPUs{gpus}"


def without_gpus() -> Machine:
    """Return this machine as if it had no CUDA devices, whose count needs torch."""
    return Machine(len(os.sched_getaffinity(0)), 0)


def this_machine() -> Machine:
    """Count the CPUs and CUDA devices of this machine."""
    import torch

    return Machine(len(os.sched_getaffinity(0)), torch.cuda.device_count())


def fitting_defaults(machine: Machine) -> dict[str, Any]:
    """Return default settings of a study: small on CPUs, the usual ones on GPUs."""
    if machine.num_gpus:
        cpus = max(1, machine.num_cpus // machine.num_gpus)
        return {
            "trials": 30,
            "space": "quick",
            "trial": {
                "backbone": {"name": "resnet50.a1_in1k", "weights": "timm"},
                "data": {"image_size": 224, "loader_workers": max(1, cpus - 1)},
                "training": {"epochs": 30, "batch_size": 64},
            },
            "resources": {"cpus_per_worker": cpus, "gpus_per_worker": 1.0},
        }
    cpus = 1 if machine.num_cpus <= 4 else 2 if machine.num_cpus <= 16 else 4
    return {
        "trials": 12,
        "space": "quick",
        "trial": {
            "backbone": {
                "name": DEMO_BACKBONE,
                "weights": "demo" if has_demo_weights() else "timm",
            },
            "data": {"image_size": 96},
            "training": {"epochs": 8, "batch_size": 32},
        },
        "resources": {"cpus_per_worker": cpus},
    }
