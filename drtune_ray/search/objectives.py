"""What a study optimises: validation accuracy alone, or against what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from drtune_ray.training.reports import OBJECTIVE, result_history

Direction = Literal["maximize", "minimize"]

# Measured in each epoch, under these names.
OF_EPOCHS: dict[str, tuple[str, Direction]] = {
    "val_accuracy": (OBJECTIVE, "maximize"),
    "worst_class_accuracy": ("val_worst_class_accuracy", "maximize"),
    "calibration_error": ("val_calibration_error", "minimize"),
}
# Of the classifier, whatever its weights; see `training.complexity`.
OF_CLASSIFIERS: dict[str, Direction] = {
    "latency_ms": "minimize",
    "num_parameters": "minimize",
    "flops": "minimize",
}


def direction(objective: str) -> Direction:
    """Which way an objective is better."""
    return OF_EPOCHS[objective][1] if objective in OF_EPOCHS else OF_CLASSIFIERS[objective]


def final_values(
    objectives: tuple[str, ...], result: Mapping[str, Any], costs: Mapping[str, float]
) -> list[float]:
    """The value of each objective at the trial's best epoch, never its last.

    Args:
        objectives: Their names.
        result: The trial's last result.
        costs: Of its classifier.
    """
    history = {record.epoch: record.metrics for record in result_history(dict(result))}
    best = history[int(history[max(history)]["best_epoch"])]
    return [best[OF_EPOCHS[name][0]] if name in OF_EPOCHS else costs[name] for name in objectives]
