"""Environment variables: setting them for a while, and those of a Ray job."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # that is its name
ADDRESS, LOCAL = "RAY_ADDRESS", "local"
SUBMITTED_WITH = "drtune_arguments"  # in a job's metadata: those of the command, as JSON


def ray_address() -> str:
    """Return the cluster's address, ``local`` where the variable is not set, or set to nothing.

    Whoever can override a variable but not remove it sets it to nothing (Ray does the same).
    """
    return os.environ.get(ADDRESS) or LOCAL


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within a block."""
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def job_config() -> Mapping[str, Any]:
    """Return ``runtime_env`` and ``metadata`` of this process's Ray job; empty if it is none."""
    config: Mapping[str, Any] = json.loads(os.environ.get(JOB_CONFIG) or "{}")
    return config
