"""The objectives of a study: validation accuracy alone, or against costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from drtune_ray.training.reports import OBJECTIVE, result_history

Direction = Literal["maximize", "minimize"]

# Objectives that each epoch measures: metric and direction.
OF_EPOCHS: dict[str, tuple[str, Direction]] = {
    "val_accuracy": (OBJECTIVE, "maximize"),
    "worst_class_accuracy": ("val_worst_class_accuracy", "maximize"),
    "calibration_error": ("val_calibration_error", "minimize"),
}
# Objectives of the classifier, independent of its weights; see `training.complexity`.
OF_CLASSIFIERS: dict[str, Direction] = {
    "latency_ms": "minimize",
    "num_parameters": "minimize",
    "flops": "minimize",
}


def direction(objective: str) -> Direction:
    """Return whether an objective is maximised or minimised."""
    return OF_EPOCHS[objective][1] if objective in OF_EPOCHS else OF_CLASSIFIERS[objective]


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
    return [best[OF_EPOCHS[name][0]] if name in OF_EPOCHS else costs[name] for name in objectives]
