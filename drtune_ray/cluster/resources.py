"""What the command of a job reserves for itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from drtune_ray.errors import ConfigError


@dataclass(frozen=True)
class EntrypointResources:
    """What a job's command itself reserves; with nothing it runs on the head node.

    Attributes:
        num_cpus: CPUs.
        num_gpus: GPUs.
        memory: Bytes.
        custom: Resources that the cluster declares.
    """

    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    custom: Mapping[str, float] = field(default_factory=dict)


def custom_resources(text: str | None) -> dict[str, float]:
    """Resources as Ray's command line takes them, like ``{"trial_driver": 1}``.

    Raises:
        ConfigError: If they are no such object.
    """
    try:
        amounts = json.loads(text or "{}")
    except ValueError:
        amounts = None
    are_amounts = isinstance(amounts, dict) and all(
        type(amount) in (int, float) and amount > 0 for amount in amounts.values()
    )
    if not are_amounts:
        raise ConfigError(
            f"--entrypoint-resources {text!r} must be names and amounts as JSON, like "
            "'{\"trial_driver\": 1}'"
        )
    return {name: float(amount) for name, amount in amounts.items()}
