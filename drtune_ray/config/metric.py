"""The metrics by which epochs, trials and winners can be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["maximize", "minimize"]
MetricName = Literal[
    "val_accuracy",
    "balanced_accuracy",
    "macro_f1",
    "auroc",
    "log_loss",
    "worst_class_accuracy",
    "calibration_error",
]
DEFAULT_METRIC: MetricName = "val_accuracy"
# Bins of confidence, as in Guo et al., "On calibration of modern neural networks", 2017.
NUM_BINS = 15


@dataclass(frozen=True)
class Metric:
    """A metric of the validation after each epoch.

    Attributes:
        measure: Its name among the metrics of an epoch.
        label: Its name for people.
        direction: Whether more or less is better.
        is_share: Whether people read it in percent.
    """

    measure: str
    label: str
    direction: Direction = "maximize"
    is_share: bool = True

    @property
    def best(self) -> str:
        """Name of the best value so far among the metrics of an epoch."""
        return f"best_{self.measure}"

    @property
    def mode(self) -> Literal["max", "min"]:
        """The direction as Ray Tune calls it."""
        return "max" if self.direction == "maximize" else "min"

    def score(self, value: float) -> float:
        """Return a number that is the higher the better the value is."""
        return value if self.direction == "maximize" else -value


METRICS: dict[str, Metric] = {
    "val_accuracy": Metric("val_accuracy", "validation accuracy"),
    "balanced_accuracy": Metric("val_balanced_accuracy", "balanced validation accuracy"),
    "macro_f1": Metric("val_macro_f1", "macro F1 on the validation images"),
    "auroc": Metric("val_auroc", "AUROC on the validation images"),
    "log_loss": Metric("val_loss", "log loss on the validation images", "minimize", is_share=False),
    "worst_class_accuracy": Metric("val_worst_class_accuracy", "accuracy of the worst class"),
    "calibration_error": Metric("val_calibration_error", "calibration error", "minimize"),
}


def metric_of(trial: Mapping[str, Any]) -> Metric:
    """Return the metric that chooses in a trial, by its configuration as plain values.

    Earlier records lack the setting: accuracy chose.
    """
    return METRICS[trial.get("training", {}).get("metric", DEFAULT_METRIC)]
