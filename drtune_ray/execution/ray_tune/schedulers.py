"""Ray Tune's early stopping by epochs, over trials that are known by their Optuna number.

Two of Tune's schedulers need only to stop trials, and these are offered. The others are refused in
`drtune_ray.config.study` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric
from drtune_ray.config.study import SchedulerConfig
from drtune_ray.results.trials import values_by_epoch
from drtune_ray.training.reports import CONFIG_NUMBER, EPOCH, OBJECTIVE, result_history


def build_scheduler(
    config: SchedulerConfig,
    max_epochs: int,
    reference_numbers: Collection[int],
    metric: Metric = METRICS[DEFAULT_METRIC],
) -> StudyScheduler | None:
    """Build the scheduler of a search; None where every trial runs to its end.

    Args:
        config: Name of the scheduler, and its settings.
        max_epochs: Epochs of a trial (R).
        reference_numbers: Numbers of the reference trials, which it never stops; may grow later.
        metric: Metric that chooses.
    """
    common = {"time_attr": EPOCH, "metric": OBJECTIVE, "mode": metric.mode}
    grace_period = config.first_rung(max_epochs)
    rule: TrialScheduler
    if config.name == "asha":
        rule = AsyncHyperBandScheduler(
            max_t=max_epochs,
            grace_period=grace_period,
            reduction_factor=config.reduction_factor,
            **common,
        )
        return StudyScheduler(rule, rule.on_trial_result, reference_numbers, metric.best)
    if config.name == "median":
        rule = _MedianRule(
            grace_period=grace_period, min_samples_required=config.min_trials, **common
        )
        return StudyScheduler(rule, rule.on_trial_complete, reference_numbers, metric.best)
    return None


@dataclass(frozen=True)
class _Known:
    """A trial for a rule: Tune's ids change between drivers, Optuna's numbers do not."""

    trial_id: str


class StudyScheduler(FIFOScheduler):  # type: ignore[misc]
    """A stopping rule of Tune with the trials of earlier drivers.

    Each epoch of a trial enters the rule once, in its order, however often it is reported: a
    resumed trial trains epochs again, or comes with some that no driver saw. Reference trials run
    to their last epoch and do not enter the rule. The values of a trial that fails stay in it: they
    are valid.

    Args:
        rule: Tune's ASHA or median stopping rule (Golovin et al., Vizier, KDD 2017).
        enter: Method of the rule that enters a value without stopping a trial.
        reference_numbers: Numbers of the reference trials; may grow later.
        best: Name of the best value so far among the metrics of an epoch.
    """

    def __init__(
        self,
        rule: TrialScheduler,
        enter: Callable[[Any, _Known, dict[str, Any]], Any],
        reference_numbers: Collection[int],
        best: str,
    ) -> None:
        super().__init__()
        self.rule, self._enter, self._reference_numbers = rule, enter, reference_numbers
        self._best = best
        self._last_epochs: dict[str, int] = {}  # that entered the rule, by trial
        self._undecided: dict[str, dict[str, Any]] = {}

    def refill(self, trials: Iterable[FrozenTrial]) -> None:
        """Enter the recorded values of earlier trials, so that the rule decides as if unbroken.

        Whether the rule was asked about the last value of an unfinished trial is not known: the
        driver may have been killed in between. If the trial reports the epoch again, it was not.
        """
        for trial in trials:
            if trial.number in self._reference_numbers:
                continue
            known = _Known(str(trial.number))
            results = [
                {EPOCH: epoch, OBJECTIVE: value}
                for epoch, value in sorted(values_by_epoch(trial).items())
            ]
            if results:
                self.rule.on_trial_add(None, known)
            if results and trial.state == TrialState.RUNNING:
                self._undecided[known.trial_id] = results.pop()
            for result in results:
                self._enter_once(known, result)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Enter a trial under its number."""
        if (known := self._known(trial)) is not None:
            self.rule.on_trial_add(tune_controller, known)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop a trial if the rule says so, of this epoch or of an earlier one that was missed."""
        if (known := self._known(trial)) is None:
            return str(TrialScheduler.CONTINUE)
        self._settle(known, result)
        decisions = {
            str(self.rule.on_trial_result(tune_controller, known, missed))
            for missed in self._missed(known, result)
        }
        is_stopped = TrialScheduler.STOP in decisions
        return str(TrialScheduler.STOP if is_stopped else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Enter the last value, which Tune does not show to `on_trial_result`."""
        if (known := self._known(trial)) is not None and result.get(EPOCH):
            self._settle(known, result)
            for missed in self._missed(known, result):
                self._enter(tune_controller, known, missed)

    def _settle(self, known: _Known, result: dict[str, Any]) -> None:
        """Enter the value of an epoch that the rule let pass, since the trial is beyond it."""
        undecided = self._undecided.get(known.trial_id)
        if undecided is not None and undecided[EPOCH] < result[EPOCH]:
            self._enter_once(known, self._undecided.pop(known.trial_id))

    def _enter_once(self, known: _Known, result: dict[str, Any]) -> None:
        for missed in self._missed(known, result):
            self._enter(None, known, missed)

    def _missed(self, known: _Known, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the epochs of a result that have not entered the rule; they enter now."""
        earlier = [
            {EPOCH: record.epoch, OBJECTIVE: record.metrics[self._best]}
            for record in result_history(result)
            if record.epoch < result[EPOCH]
        ]
        for one in (*earlier, result):
            if one[EPOCH] > self._last_epochs.get(known.trial_id, 0):
                self._last_epochs[known.trial_id] = one[EPOCH]
                yield one

    def _known(self, trial: Any) -> _Known | None:
        number = int(trial.config[CONFIG_NUMBER])
        return None if number in self._reference_numbers else _Known(str(number))


class _MedianRule(MedianStoppingRule):  # type: ignore[misc]
    """Tune's median stopping rule, which stops nothing while there are too few trials."""

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        # Tune's own would pause the trial, to let others run that are not there.
        return str(TrialScheduler.CONTINUE)
