"""ASHA by epochs, over trials that are known by their Optuna number."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any

from optuna.trial import FrozenTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from drtune_ray.config import SchedulerConfig
from drtune_ray.search.protocol import CONFIG_NUMBER, EPOCH, OBJECTIVE


def build_scheduler(
    config: SchedulerConfig, max_epochs: int, reference_numbers: Collection[int]
) -> StudyASHA | None:
    """The scheduler of a search; None where every trial runs to its end.

    Args:
        config: Which one, and its settings.
        max_epochs: Of a trial.
        reference_numbers: Numbers of the reference trials, which it never stops; may grow later.
    """
    if config.name == "none":
        return None
    return StudyASHA(config, max_epochs, reference_numbers)


class StudyASHA(AsyncHyperBandScheduler):  # type: ignore[misc]
    """Ray Tune's ASHA with two additions.

    Reference trials run to their last epoch and leave no trace in the rungs; and the rungs can be
    filled again from the values that Optuna recorded, so that a resumed study decides as the
    unbroken one would. Tune's trial ids change between drivers: rungs know Optuna's numbers.

    Args:
        config: `min_epochs` (r) and `reduction_factor` (eta).
        max_epochs: R.
        reference_numbers: Numbers of the reference trials; may grow later.
    """

    def __init__(
        self, config: SchedulerConfig, max_epochs: int, reference_numbers: Collection[int]
    ) -> None:
        super().__init__(
            time_attr=EPOCH,
            max_t=max_epochs,
            grace_period=min(config.min_epochs, max_epochs),
            reduction_factor=config.reduction_factor,
            metric=OBJECTIVE,
            mode="max",
        )
        self._reference_numbers = reference_numbers

    def refill(self, trials: Iterable[FrozenTrial]) -> None:
        """Enter the recorded intermediate values of earlier trials into the rungs."""
        for trial in trials:
            if trial.number in self._reference_numbers or not trial.intermediate_values:
                continue
            known = SimpleNamespace(trial_id=str(trial.number))
            super().on_trial_add(None, known)
            for epoch, value in sorted(trial.intermediate_values.items()):
                super().on_trial_result(None, known, {EPOCH: epoch, OBJECTIVE: value})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial joins the rungs under its number."""
        if self._is_ranked(trial):
            super().on_trial_add(tune_controller, _numbered(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop a trial that its rung has left behind."""
        if not self._is_ranked(trial):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, _numbered(trial), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Enter the last value, which Tune does not show to `on_trial_result`."""
        if self._is_ranked(trial) and result.get(EPOCH):
            super().on_trial_result(tune_controller, _numbered(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that never ran."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A failed trial keeps its rungs: its values were true."""

    def _is_ranked(self, trial: Any) -> bool:
        return trial.config[CONFIG_NUMBER] not in self._reference_numbers


def _numbered(trial: Any) -> SimpleNamespace:
    return SimpleNamespace(trial_id=str(trial.config[CONFIG_NUMBER]))
