"""Environment variables: set for a time, and what the job server gives a job."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.train.v2._internal import constants

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # that is its name
SUBMITTED_WITH = "drtune_arguments"  # in a job's metadata: those of the command, as JSON
ADDRESS = "RAY_ADDRESS"


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Within, these variables are set."""
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
    """What Ray's job server gave this process: ``runtime_env``, ``metadata``; empty without one."""
    config: Mapping[str, Any] = json.loads(os.environ.get(JOB_CONFIG) or "{}")
    return config


@contextmanager
def own_cluster() -> Iterator[None]:
    """Within, Ray's dashboard is looked for in this process's own cluster.

    Ray looks for it in the one that was started last on the machine (Ray 2.60), also when an actor
    of Ray Train's asks whether a controller lives: that of another cluster knows no such
    controller, and the actor would remove the workers of one that trains.
    """
    constants.ENV_VARS_TO_PROPAGATE.add(ADDRESS)
    with environment({ADDRESS: ray.get_runtime_context().gcs_address}):
        yield
