"""Ray Tune's early stopping by epochs, over trials that are known by their Optuna number.

Of Tune's schedulers two need nothing but to stop a trial, and those are offered. The others are
refused in `drtune_ray.config.study` with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.trial import FrozenTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from drtune_ray.config.study import SchedulerConfig
from drtune_ray.results.trials import values_by_epoch
from drtune_ray.training.reports import CONFIG_NUMBER, EPOCH, OBJECTIVE


class StudyScheduler(Protocol):
    """One of Tune's schedulers that knows the trials of earlier drivers.

    Reference trials run to their last epoch and leave no trace in it. Tune's trial ids change
    between drivers: it knows Optuna's numbers.
    """

    def refill(self, trials: Iterable[FrozenTrial]) -> None:
        """Enter the recorded values of earlier trials: it decides as one that saw them would."""


def build_scheduler(
    config: SchedulerConfig, max_epochs: int, reference_numbers: Collection[int]
) -> StudyASHA | StudyMedian | None:
    """The scheduler of a search; None where every trial runs to its end.

    Args:
        config: Which one, and its settings.
        max_epochs: R, of a trial.
        reference_numbers: Numbers of the reference trials, which it never stops; may grow later.
    """
    if config.name == "asha":
        return StudyASHA(config, max_epochs, reference_numbers)
    if config.name == "median":
        return StudyMedian(config, max_epochs, reference_numbers)
    return None


@dataclass(frozen=True)
class _Known:
    """A trial as a scheduler sees it."""

    trial_id: str


class StudyASHA(AsyncHyperBandScheduler):  # type: ignore[misc]
    """Ray Tune's ASHA as a `StudyScheduler`.

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
            grace_period=config.first_rung(max_epochs),
            reduction_factor=config.reduction_factor,
            metric=OBJECTIVE,
            mode="max",
        )
        self._reference_numbers = reference_numbers

    def refill(self, trials: Iterable[FrozenTrial]) -> None:
        """Enter the recorded intermediate values of earlier trials into the rungs."""
        for known, results in _recorded(trials, self._reference_numbers):
            super().on_trial_add(None, known)
            for result in results:
                super().on_trial_result(None, known, result)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial joins the rungs under its number."""
        if _number(trial) not in self._reference_numbers:
            super().on_trial_add(tune_controller, _known(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop a trial that its rung has left behind."""
        if _number(trial) in self._reference_numbers:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, _known(trial), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Enter the last value, which Tune does not show to `on_trial_result`."""
        if _number(trial) not in self._reference_numbers and result.get(EPOCH):
            super().on_trial_result(tune_controller, _known(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that never ran."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A failed trial keeps its rungs: its values were true."""


class StudyMedian(MedianStoppingRule):  # type: ignore[misc]
    """Ray Tune's median stopping rule (Golovin et al., Vizier, KDD 2017) as a `StudyScheduler`.

    A trial is stopped when its best accuracy so far is below the median of the others' mean over
    their epochs up to this one.

    Args:
        config: `min_epochs` and `min_trials`, before which it stops nothing.
        max_epochs: R.
        reference_numbers: Numbers of the reference trials; may grow later.
    """

    def __init__(
        self, config: SchedulerConfig, max_epochs: int, reference_numbers: Collection[int]
    ) -> None:
        super().__init__(
            time_attr=EPOCH,
            metric=OBJECTIVE,
            mode="max",
            grace_period=config.first_rung(max_epochs),
            min_samples_required=config.min_trials,
        )
        self._reference_numbers = reference_numbers

    def refill(self, trials: Iterable[FrozenTrial]) -> None:
        """Enter the recorded intermediate values of earlier trials."""
        for known, results in _recorded(trials, self._reference_numbers):
            self._results[known].extend(results)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop a trial that is worse than the median."""
        if _number(trial) in self._reference_numbers:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, _known(trial), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Enter the last value, which Tune does not show to `on_trial_result`."""
        if _number(trial) not in self._reference_numbers and result.get(EPOCH):
            super().on_trial_complete(tune_controller, _known(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that never ran."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A failed trial's values were true."""

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        # Tune's own would pause the trial, to let others run that are not there.
        return str(TrialScheduler.CONTINUE)


def _recorded(
    trials: Iterable[FrozenTrial], reference_numbers: Collection[int]
) -> Iterable[tuple[_Known, list[dict[str, Any]]]]:
    for trial in trials:
        values = sorted(values_by_epoch(trial).items())
        if values and trial.number not in reference_numbers:
            results = [{EPOCH: epoch, OBJECTIVE: value} for epoch, value in values]
            yield _Known(str(trial.number)), results


def _number(trial: Any) -> int:
    return int(trial.config[CONFIG_NUMBER])


def _known(trial: Any) -> _Known:
    return _Known(str(_number(trial)))
