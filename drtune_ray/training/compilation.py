"""Encoders compiled by PyTorch."""

from __future__ import annotations

import os
import shutil

import torch

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.method import Method

COMPILERS = ("g++", "clang++")


def compile_encoders(method: Method, device: torch.device) -> None:
    """Compile the trained and the frozen encoder, in place, at their first call.

    Each shape of a batch is compiled by itself: kernels for any shape would depend on which came
    first, and a resumed run would differ from the unbroken one.

    Raises:
        EnvironmentProblem: If the device is a CPU and this machine has no C++ compiler.
    """
    own = os.environ.get("CXX")
    if device.type == "cpu" and not any(map(shutil.which, (own,) if own else COMPILERS)):
        raise EnvironmentProblem(
            f"training.compile needs a C++ compiler on CPUs, and this machine has none of "
            f"{[own] if own else list(COMPILERS)}: install one, or set training.compile=false"
        )
    for name in ("downstream_encoder", "pretrained_encoder"):
        encoder = getattr(method, name, None)
        if encoder is not None:
            encoder.compile(dynamic=False)
