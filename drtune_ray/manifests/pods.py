"""How many pods a study takes, and how large each is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drtune_ray.config.study import StudyConfig
from drtune_ray.execution.capacity import Node, trial_demand

DEFAULT_TRIALS_AT_A_TIME = 2
# Of the head, for what waits there for the workers of a trial: a guess to be measured.
DRIVER_GIB = 1.5
GPU = "nvidia.com/gpu"
_QUANTITY = re.compile(r"(\d+)(Mi|Gi)")
_MIB = {"Mi": 1, "Gi": 1024}


@dataclass(frozen=True)
class WorkerPods:
    """The pods of a study's workers; each is a node of Ray.

    Attributes:
        count: How many.
        workers_each: Workers that one holds: more than one where they share its GPU.
        num_cpus: Of one.
        num_gpus: Of one.
        num_drivers: Trials at a time, whose workers the head waits for.
        drivers_take_memory: Whether each is a process: of trials of several workers.
    """

    count: int
    workers_each: int
    num_cpus: int
    num_gpus: int
    num_drivers: int
    drivers_take_memory: bool


def worker_pods(config: StudyConfig) -> WorkerPods:
    """Pods that hold the trials that run at a time, one worker each unless they share a GPU.

    Raises:
        ConfigError: If the workers' shares of GPUs make no sense.
    """
    demand = trial_demand(config.trial.training, config.resources)
    trials = trials_at_a_time(config)
    num_workers = max(trials * demand.num_workers, _final_workers(config))
    num_gpus = math.ceil(demand.num_gpus)
    each = 1
    if 0 < demand.num_gpus < 1:
        each = min(num_workers, demand.bundles_on(Node(demand.num_cpus * num_workers, 1)))
    return WorkerPods(
        count=math.ceil(num_workers / each),
        workers_each=each,
        num_cpus=config.resources.cpus_per_worker * each,
        num_gpus=num_gpus,
        num_drivers=trials,
        drivers_take_memory=demand.num_workers > 1,
    )


def _final_workers(config: StudyConfig) -> int:
    """Most that the final fit may have, where it asks for others than a trial."""
    asked = config.final_fit
    if asked.images == "none" or asked.workers is None:
        return 0
    return config.trial.training.model_copy(update={"workers": asked.workers}).max_workers


def trials_at_a_time(config: StudyConfig) -> int:
    """As the study says, else a small number: what a cluster holds is not known before it runs."""
    return min(config.resources.trials_at_a_time or DEFAULT_TRIALS_AT_A_TIME, config.trials)


def memory_mib(container: Mapping[str, Any]) -> int:
    """The memory that a container of a template has."""
    found = _QUANTITY.fullmatch(container["resources"]["limits"]["memory"])
    assert found, "templates write memory in Mi or Gi"
    return int(found[1]) * _MIB[found[2]]


def set_resources(
    pod: dict[str, Any], *, memory: int, cpus: int | None = None, gpus: int = 0
) -> None:
    """Give the first container of a pod its share, and its shared memory half of the memory.

    Args:
        pod: The spec; changed in place.
        memory: In MiB.
        cpus: None leaves what is there.
        gpus: Devices.
    """
    container = pod["containers"][0]
    share = {"cpu": str(cpus) if cpus else container["resources"]["limits"]["cpu"]}
    share["memory"] = f"{memory}Mi"
    if gpus:
        share[GPU] = str(gpus)
    # Ray reads the limits, the scheduler the requests.
    container["resources"] = {"requests": dict(share), "limits": dict(share)}
    for volume in pod["volumes"]:
        if volume["name"] == "shm":
            volume["emptyDir"]["sizeLimit"] = f"{memory // 2}Mi"
