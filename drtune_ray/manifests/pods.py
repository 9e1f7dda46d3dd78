"""Number and size of the pods of a study."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drtune_ray.config.study import StudyConfig
from drtune_ray.execution.capacity import Node, trial_demand

DEFAULT_TRIALS_AT_A_TIME = 2
# Memory of the head per trial, for the process that waits for its workers: an estimate.
DRIVER_GIB = 1.5
GPU = "nvidia.com/gpu"
_QUANTITY = re.compile(r"(\d+)(Mi|Gi)")
_MIB = {"Mi": 1, "Gi": 1024}


@dataclass(frozen=True)
class WorkerPods:
    """The pods of a study's workers; each is a Ray node.

    Attributes:
        count: Number of pods.
        workers_each: Number of workers per pod; more than one if they share a GPU.
        num_cpus: Number of CPUs per pod.
        num_gpus: Number of GPUs per pod.
        num_drivers: Number of concurrent trials, whose workers the head waits for.
        drivers_take_memory: Whether each concurrent trial has a process on the head.
    """

    count: int
    workers_each: int
    num_cpus: int
    num_gpus: int
    num_drivers: int
    drivers_take_memory: bool


def worker_pods(config: StudyConfig) -> WorkerPods:
    """Return the pods for the concurrent trials, one worker each unless they share a GPU.

    Raises:
        ConfigError: If the GPU shares of the workers are not valid.
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
    """Return the maximum number of workers of the final fit, 0 if it has those of a trial."""
    fit = config.final_fit
    if fit.images == "none" or fit.workers is None:
        return 0
    return config.trial.training.model_copy(update={"workers": fit.workers}).max_workers


def trials_at_a_time(config: StudyConfig) -> int:
    """Return the study's setting, else a small default: the cluster's size is not known yet."""
    return min(config.resources.trials_at_a_time or DEFAULT_TRIALS_AT_A_TIME, config.trials)


def memory_mib(container: Mapping[str, Any]) -> int:
    """Return the memory of a template's container in MiB."""
    found = _QUANTITY.fullmatch(container["resources"]["limits"]["memory"])
    assert found, "templates write memory in Mi or Gi"
    return int(found[1]) * _MIB[found[2]]


def set_resources(
    pod: dict[str, Any], *, memory: int, cpus: int | None = None, gpus: int = 0
) -> None:
    """Set the resources of a pod's first container; shared memory gets half of the memory.

    Args:
        pod: Pod spec, changed in place.
        memory: Memory in MiB.
        cpus: Number of CPUs; None keeps the template's.
        gpus: Number of GPUs.
    """
    container = pod["containers"][0]
    share = {"cpu": str(cpus) if cpus else container["resources"]["limits"]["cpu"]}
    share["memory"] = f"{memory}Mi"
    if gpus:
        share[GPU] = str(gpus)
    # Ray reads the limits, the Kubernetes scheduler reads the requests.
    container["resources"] = {"requests": dict(share), "limits": dict(share)}
    for volume in pod["volumes"]:
        if volume["name"] == "shm":
            volume["emptyDir"]["sizeLimit"] = f"{memory // 2}Mi"
