"""A study of twelve trials, told by events: for tests of what is shown."""

from __future__ import annotations

from collections.abc import Callable

from drtune_ray.display.progress import StudyProgress
from drtune_ray.results.trials import TrialSummary
from drtune_ray.tracking.events import Event, MetricsRecorded, RunFinished, RunStarted

SEARCHED = (
    "method.regularization_weight",
    "method.bank_size",
    "optim.backbone_lr",
    "optim.weight_decay",
)
PARAMS = {
    "method.name": "dr_tune",
    "method.regularization_weight": 0.5538746,
    "method.bank_size": 64,
    "optim.backbone_lr": 0.00093,
    "optim.weight_decay": 1e-4,
}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def started(number: int, reference: str = "", **changes: object) -> RunStarted:
    params = PARAMS | {key.replace("__", "."): value for key, value in changes.items()}
    tags = {"drtune.reference": reference} if reference else {}
    return RunStarted(number, f"trial-{number:04d}", params, tags)


def epoch(number: int, step: int, accuracy: float, best: float, seconds: float = 6.0) -> Event:
    metrics = {"val_accuracy": accuracy, "best_val_accuracy": best, "seconds": seconds}
    return MetricsRecorded(number, step, metrics)


def ended(number: int, state: str = "COMPLETE", outcome: str = "completed") -> RunFinished:
    return RunFinished(number, state, outcome, {}, {})


def earlier(number: int, state: str, best: float | None, num_epochs: int = 10) -> TrialSummary:
    config = {"method": {"name": "dr_tune", "bank_size": 128}}
    return TrialSummary(number, state, state.lower(), None, best, num_epochs, 60.0, config)


def progress_of(*events: Event, clock: Callable[[], float], **changes: object) -> StudyProgress:
    values: dict[str, object] = {"num_trials": 12, "num_done": 2, "num_epochs": 10}
    progress = StudyProgress(**(values | {"searched": SEARCHED} | changes), clock=clock)  # type: ignore[arg-type]
    for event in events:
        progress.take(event)
    return progress


def events() -> list[Event]:
    """Trial 2 has ended, 3 to 5 run; their settings differ in three of four searched paths."""
    found: list[Event] = [started(2, "ce_tuning", method__name="ce_tuning")]
    found += [started(3), started(4, method__bank_size=4096), started(5, optim__backbone_lr=0.02)]
    found += [epoch(2, 10, 0.8355, 0.8455), ended(2)]
    found += [epoch(3, 4, 0.8532, 0.8632), epoch(4, 1, 0.25, 0.25, seconds=12.0)]
    return [*found, started(6, method__regularization_weight=2.25)]
