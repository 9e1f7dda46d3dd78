"""The objectives of a study: a metric that chooses, alone or against others and costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drtune_ray.config.metric import METRICS, Direction
from drtune_ray.training.reports import result_history

# Objectives of the classifier, independent of its weights; see `training.complexity`.
OF_CLASSIFIERS: dict[str, Direction] = {
    "latency_ms": "minimize",
    "num_parameters": "minimize",
    "flops": "minimize",
}


def direction(objective: str) -> Direction:
    """Return whether an objective is maximised or minimised."""
    return METRICS[objective].direction if objective in METRICS else OF_CLASSIFIERS[objective]


def final_values(
    objectives: tuple[str, ...], result: Mapping[str, Any], costs: Mapping[str, float]
) -> list[float]:
    """Return the value of each objective at the trial's best epoch.

    Args:
        objectives: Names of the objectives.
        result: The trial's last result.
        costs: Costs of the trial's classifier by name.
    """
    history = {record.epoch: record.metrics for record in result_history(dict(result))}
    best = history[int(history[max(history)]["best_epoch"])]
    return [best[METRICS[name].measure] if name in METRICS else costs[name] for name in objectives]
