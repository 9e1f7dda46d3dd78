"""StudySearch: Ray Tune's searcher over an Optuna study, which is the truth.

A trial is known by its Optuna number. Ray's own OptunaSearch tells the sampler that a trial
stopped early is a finished one and leaves diverged ones RUNNING; this one tells what happened:

    finished, or stopped by its own patience      COMPLETE  with its best value
    stopped by the scheduler                      PRUNED    with its best values by epoch
    diverged or out of memory, because of the     PRUNED    with a violated constraint, so that
    point                                                   the sampler avoids it
    the machine's fault                           FAIL      with what the machine did
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.search import Searcher

from drtune_ray.config import SamplerConfig, TrialConfig
from drtune_ray.results import trials
from drtune_ray.search.protocol import (
    CONFIG_NUMBER,
    CONFIG_TRIAL,
    NUM_THREADS,
    OBJECTIVE,
    OUT_OF_MEMORY,
    OUTCOME,
    result_history,
)
from drtune_ray.search.space import SearchSpace
from drtune_ray.training.model import derived_seed
from drtune_ray.training.records import COMPLETED, DIVERGED, PATIENCE

STOPPED_BY_SCHEDULER = "stopped by the scheduler"
CONSTRAINT = "trains"
RESULT_STATES = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Reference:
    """A trial that every study runs first: its name and configuration."""

    name: str
    config: TrialConfig


class StudySearch(Searcher):  # type: ignore[misc]
    """Proposes unfinished trials first, then the references, then what Optuna samples.

    Args:
        study: The Optuna study; its storage outlives this object.
        space: What to search.
        base: The configuration that the space varies.
        references: Trials to run first, in this order.
        num_trials: How many trials the study shall hold, references included. One that the
            machine failed takes its place in this run and is made good by the next.
        sampler_for: Optuna's sampler for the trial of a number. One for each, so that a resumed
            study proposes what the unbroken one would from the same history.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        base: TrialConfig,
        references: tuple[Reference, ...],
        num_trials: int,
        sampler_for: Callable[[int], optuna.samplers.BaseSampler],
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._sampler_for = sampler_for
        self.study, self._space, self._base = study, space, base
        self._num_left = 0
        self._end: Exception | None = None
        known = study.get_trials(deepcopy=False)
        # What the machine failed, and what never got its configuration, is run again.
        sound = [t for t in known if t.state != TrialState.FAIL and trials.CONFIG in t.user_attrs]
        begun = {trial.user_attrs.get(trials.REFERENCE) for trial in sound}
        self._references = deque(r for r in references if r.name not in begun)
        self.reference_numbers = {t.number for t in known if t.user_attrs.get(trials.REFERENCE)}
        self._unfinished = deque(self._adopt(known))
        self._num_left = num_trials - len(sound)
        self._active: dict[str, Trial] = {}
        self._reported: dict[int, set[int]] = {t.number: set(t.intermediate_values) for t in known}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial as Tune's config, or FINISHED."""
        if self._unfinished:
            trial = self._unfinished.popleft()
        elif self._num_left <= 0:
            return str(Searcher.FINISHED)
        else:
            trial = self._new_trial()
            self._num_left -= 1
        self._active[trial_id] = trial
        return {CONFIG_NUMBER: trial.number, CONFIG_TRIAL: trial.user_attrs[trials.CONFIG]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record the best value so far, by epoch."""
        if trial := self._active.get(trial_id):
            self._report(trial, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna what became of the trial; without a word of it, it stays unfinished.

        Of an error Tune says here no more than that there was one: see `fail`.
        """
        if error or not result or trial_id not in self._active or self._end is not None:
            return
        trial = self._active[trial_id]
        with self._error_kept():
            self._report(trial, result)
            self._tell_outcome(trial, result)
            del self._active[trial_id]

    def fail(self, trial_id: str, outcome: str) -> None:
        """Tell Optuna that the machine failed a trial for the last time, and how."""
        if trial := self._active.pop(trial_id, None):
            with self._error_kept():
                self._tell(trial, TrialState.FAIL, outcome)

    def end_with(self, error: Exception) -> None:
        """End the study at the next `check_storage`; no trial is told to Optuna any more."""
        self._end = error

    def check_storage(self) -> None:
        """To be called where an error ends the study.

        Raises:
            Exception: Of `end_with`; or what Optuna's storage raised before, where Tune would
                have taken it for an error of the trial.
        """
        if self._end is not None:
            raise self._end

    @contextlib.contextmanager
    def _error_kept(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # for `check_storage`
            self._end = error

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: Optuna's storage holds everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def _adopt(self, known: list[FrozenTrial]) -> list[Trial]:
        """Trials that a former driver left RUNNING, those apart that it had not yet described."""
        running = [t for t in known if t.state == TrialState.RUNNING]
        self._undescribed = deque(t for t in running if trials.CONFIG not in t.user_attrs)
        described = (t for t in running if trials.CONFIG in t.user_attrs)
        return [Trial(self.study, frozen._trial_id) for frozen in described]

    def _ask(self) -> Trial:
        """A trial without a configuration: one that was cut off as it was proposed, or a new one.

        Either is proposed by the sampler of its number, and so comes out the same.
        """
        if not self._undescribed:
            number = len(self.study.get_trials(deepcopy=False))
            self.study.sampler = self._sampler_for(number)
            return self.study.ask()
        frozen = self._undescribed.popleft()
        self.study.sampler = self._sampler_for(frozen.number)
        return Trial(self.study, frozen._trial_id)

    def _new_trial(self) -> Trial:
        if not self._references:
            trial = self._ask()
            self._describe(trial, self._space.suggest(trial, self._base))
            return trial
        reference = self._references.popleft()
        values = self._space.locate(reference.config, self._base)
        if values is not None:
            self.study.enqueue_trial(values, skip_if_exists=True)
        trial = self._ask()
        if values is not None:
            self._space.suggest(trial, self._base)  # enters the parameters
        trial.set_user_attr(trials.REFERENCE, reference.name)
        self.reference_numbers.add(trial.number)
        self._describe(trial, reference.config)
        return trial

    @staticmethod
    def _describe(trial: Trial, config: TrialConfig) -> None:
        trial.set_user_attr(trials.CONFIG, json.dumps(config.to_mapping()))

    def _report(self, trial: Trial, result: dict[str, Any]) -> None:
        reported = self._reported.setdefault(trial.number, set())
        for record in result_history(result):
            if record.epoch not in reported:
                trial.report(record.metrics[OBJECTIVE], record.epoch)
                reported.add(record.epoch)

    def _tell_outcome(self, trial: Trial, result: dict[str, Any]) -> None:
        outcome = result[OUTCOME] or STOPPED_BY_SCHEDULER
        value = float(result[OBJECTIVE])
        trial.set_user_attr(NUM_THREADS, result[NUM_THREADS])
        if outcome in (DIVERGED, OUT_OF_MEMORY):
            self._tell(trial, TrialState.PRUNED, outcome, violation=1.0)
        elif outcome in (COMPLETED, PATIENCE) and math.isfinite(value):
            self._tell(trial, TrialState.COMPLETE, outcome, value=value)
        else:
            self._tell(trial, TrialState.PRUNED, outcome)

    def _tell(
        self,
        trial: Trial,
        state: TrialState,
        outcome: str,
        *,
        value: float | None = None,
        violation: float = 0.0,
    ) -> None:
        trial.set_user_attr(trials.OUTCOME, outcome)
        # It may be there already: from a driver that was cut off behind it.
        if state != TrialState.FAIL and CONSTRAINT not in trial.constraints:
            trial.set_constraint(CONSTRAINT, violation)
        self.study.tell(trial, value, state=state)


def build_sampler(config: SamplerConfig, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler for one trial, seeded by the study's seed and the trial's number."""
    seed = derived_seed(seed, "proposal", number) % 2**32
    if config.name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # Conditional parameters are modelled together with what they depend on: `group`.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=config.num_startup_trials,
            multivariate=True,
            group=True,
            constant_liar=True,  # several trials run at a time
        )
