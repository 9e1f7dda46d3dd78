"""The thing that Ray Tune runs for a trial: a resident actor, or a driver of Ray Train workers."""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.execution import class_cache

from drtune_ray.config.study import StudyConfig
from drtune_ray.execution.capacity import Capacity
from drtune_ray.execution.ray_train.trainer import drive_trial
from drtune_ray.execution.resident_actor import TrialActor
from drtune_ray.execution.worker import Workplace


def tune_trainable(config: StudyConfig, workplace: Workplace, capacity: Capacity) -> Any:
    """A trainable with its resources."""
    # Tune would write the driver's keys into each actor's description, for all users of the
    # cluster to read. A node has its own.
    passed_on = class_cache.ENV_VARS_TO_PROPAGATE
    passed_on.difference_update({name for name in passed_on if name.startswith("AWS_")})
    if config.trial.training.max_workers == 1:
        bound = tune.with_parameters(TrialActor, workplace=workplace)
        return tune.with_resources(
            bound,
            {
                "CPU": config.resources.cpus_per_worker,
                "GPU": config.resources.worker_gpus(1),
            },
        )
    bound = tune.with_parameters(
        drive_trial,
        workplace=workplace,
        resources=config.resources,
        num_workers=config.trial.training.max_workers,
    )
    return tune.with_resources(bound, capacity.driver_resources())
