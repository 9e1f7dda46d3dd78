"""Ray Tune's early stopping by epochs, over trials that are known by their Optuna number.

Two of Tune's schedulers need only to stop trials, and these are offered. The others are refused in
`drtune_ray.config.study` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from drtune_ray.config.study import SchedulerConfig
from drtune_ray.results.trials import values_by_epoch
from drtune_ray.training.reports import CONFIG_NUMBER, EPOCH, OBJECTIVE


def build_scheduler(
    config: SchedulerConfig, max_epochs: int, reference_numbers: Collection[int]
) -> StudyScheduler | None:
    """Build the scheduler of a search; None where every trial runs to its end.

    Args:
        config: Name of the scheduler, and its settings.
        max_epochs: Epochs of a trial (R).
        reference_numbers: Numbers of the reference trials, which it never stops; may grow later.
    """
    common = {"time_attr": EPOCH, "metric": OBJECTIVE, "mode": "max"}
    grace_period = config.first_rung(max_epochs)
    rule: TrialScheduler
    if config.name == "asha":
        rule = AsyncHyperBandScheduler(
            max_t=max_epochs,
            grace_period=grace_period,
            reduction_factor=config.reduction_factor,
            **common,
        )
        return StudyScheduler(rule, rule.on_trial_result, reference_numbers)
    if config.name == "median":
        rule = _MedianRule(
            grace_period=grace_period, min_samples_required=config.min_trials, **common
        )
        return StudyScheduler(rule, rule.on_trial_complete, reference_numbers)
    return None


@dataclass(frozen=True)
class _Known:
    """A trial for a rule: Tune's ids change between drivers, Optuna's numbers do not."""

    trial_id: str


class StudyScheduler(FIFOScheduler):  # type: ignore[misc]
    """A stopping rule of Tune with the trials of earlier drivers.

    Reference trials run to their last epoch and do not enter the rule. The values of a trial that
    fails stay in it: they are valid.

    Args:
        rule: Tune's ASHA or median stopping rule (Golovin et al., Vizier, KDD 2017).
        enter: Method of the rule that enters a value without stopping a trial.
        reference_numbers: Numbers of the reference trials; may grow later.
    """

    def __init__(
        self,
        rule: TrialScheduler,
        enter: Callable[[Any, _Known, dict[str, Any]], Any],
        reference_numbers: Collection[int],
    ) -> None:
        super().__init__()
        self.rule, self._enter, self._reference_numbers = rule, enter, reference_numbers

    def refill(self, trials: Iterable[FrozenTrial]) -> None:
        """Enter the recorded values of earlier trials, so that the rule decides as if unbroken."""
        for trial in trials:
            values = sorted(values_by_epoch(trial).items())
            if values and trial.number not in self._reference_numbers:
                known = _Known(str(trial.number))
                self.rule.on_trial_add(None, known)
                for epoch, value in values:
                    self._enter(None, known, {EPOCH: epoch, OBJECTIVE: value})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Enter a trial under its number."""
        if (known := self._known(trial)) is not None:
            self.rule.on_trial_add(tune_controller, known)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop a trial if the rule says so."""
        if (known := self._known(trial)) is None:
            return str(TrialScheduler.CONTINUE)
        return str(self.rule.on_trial_result(tune_controller, known, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Enter the last value, which Tune does not show to `on_trial_result`."""
        if (known := self._known(trial)) is not None and result.get(EPOCH):
            self._enter(tune_controller, known, result)

    def _known(self, trial: Any) -> _Known | None:
        number = int(trial.config[CONFIG_NUMBER])
        return None if number in self._reference_numbers else _Known(str(number))


class _MedianRule(MedianStoppingRule):  # type: ignore[misc]
    """Tune's median stopping rule, which stops nothing while there are too few trials."""

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        # Tune's own would pause the trial, to let others run that are not there.
        return str(TrialScheduler.CONTINUE)
