"""The next trial of each part of a study: the search, then the finalists."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from drtune_ray.config.trial import TRIAL_NOT_DECIDING, TrialConfig, deciding_settings
from drtune_ray.errors import ConfigError
from drtune_ray.results import trials
from drtune_ray.search.budget import Budget
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.values import digest

# Infeasible or duplicate points that are proposed in a row before the space is taken for empty.
MAX_UNTRAINED_IN_A_ROW = 100
INFEASIBLE = "infeasible"
FIXED = "fixed_params"  # Optuna's system attribute of a trial that was enqueued
CUT_OFF = "cut off as it was proposed"
SamplerFor = Callable[[int], optuna.samplers.BaseSampler]


@dataclass(frozen=True)
class FixedTrial:
    """A trial whose configuration is given: a reference trial, or a finalist's on a new seed.

    Attributes:
        name: Name of the trial, unique in its study.
        config: Configuration of the trial.
    """

    name: str
    config: TrialConfig


class Proposals(ABC):
    """The trials of one part of a study that are still to be run, in order.

    Trials that an earlier driver left unfinished come first.

    Args:
        study: The Optuna study.
        known: All trials of the study so far.
    """

    def __init__(self, study: optuna.Study, known: Iterable[FrozenTrial]) -> None:
        self.study = study
        running = [trial for trial in known if trial.state == TrialState.RUNNING]
        # Cut off before it was described: its number is taken, and nothing else is known of it.
        self._undescribed = deque(t for t in running if trials.CONFIG not in t.user_attrs)
        described = (t for t in running if trials.CONFIG in t.user_attrs)
        self._unfinished = deque(
            Trial(study, trial._trial_id) for trial in described if self.is_ours(trial)
        )

    def next(self) -> Trial | None:
        """Return the next trial with its configuration; None if none is left."""
        if self._unfinished:
            return self._unfinished.popleft()
        return self._new_trial()

    @abstractmethod
    def has_next(self) -> bool:
        """Return whether a trial is left to run."""

    @abstractmethod
    def is_ours(self, trial: FrozenTrial) -> bool:
        """Return whether a trial belongs to this part of the study."""

    @abstractmethod
    def _new_trial(self) -> Trial | None:
        """Return a trial that was not started before; None if none is left."""

    def _ask(
        self, sampler_for: SamplerFor, point: Mapping[str, Any] | None = None, **marks: Any
    ) -> Trial:
        """Return a trial without a configuration: new, or cut off while it was proposed.

        Both are proposed by the sampler of their number, so the parameters are the same.

        Args:
            sampler_for: See `SearchProposals`.
            point: Parameters that the trial must have; the others are sampled.
            marks: User attributes of the trial.
        """
        trial = self._cut_off(sampler_for, point, marks)
        if trial is None:
            self._enqueue(point)
            number = len(self.study.get_trials(deepcopy=False))
            self.study.sampler = sampler_for(number)
            trial = self.study.ask()
        for name, value in marks.items():
            trial.set_user_attr(name, value)
        return trial

    def _enqueue(self, point: Mapping[str, Any] | None) -> None:
        """Enqueue a point for the next trial, unless a killed driver already did.

        Optuna's `skip_if_exists` would also skip a point that an earlier trial had, a failed one
        for example, and the trial would get other parameters than its configuration says.
        """
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if point is not None and point not in [t.system_attrs.get(FIXED) for t in waiting]:
            self.study.enqueue_trial(dict(point))

    def _cut_off(
        self, sampler_for: SamplerFor, point: Mapping[str, Any] | None, marks: Mapping[str, Any]
    ) -> Trial | None:
        while self._undescribed:
            frozen = self._undescribed.popleft()
            trial = Trial(self.study, frozen._trial_id)
            is_marked = all(marks.get(name) == v for name, v in frozen.user_attrs.items())
            if is_marked and frozen.system_attrs.get(FIXED) == point:
                self.study.sampler = sampler_for(frozen.number)
                return trial
            # It was to become something else, which is proposed in its own turn.
            trial.set_user_attr(trials.NOT_TRAINED, CUT_OFF)
            self.study.tell(trial, state=TrialState.FAIL)
        return None


class SearchProposals(Proposals):
    """The user's own points, the reference trials, then the points that Optuna samples.

    A sampled point that violates a constraint of the space, or repeats an earlier one, is recorded
    as such and not trained.

    Afterwards `end` holds the reason why there is no further trial, and `is_exhausted` whether the
    space is exhausted.

    Args:
        study: The Optuna study; its storage outlives this object.
        space: The search space.
        base: The configuration that the space varies.
        references: Trials to run before what is sampled, in this order.
        budget: Ends the search.
        sampler_for: Returns Optuna's sampler for a trial by its number. Each trial has its own, so
            that a resumed study proposes what an unbroken one would from the same history.
        start_with: Points of the space to run first, as `start_points` returns them; parameters
            that a point leaves open are sampled.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        base: TrialConfig,
        references: tuple[FixedTrial, ...],
        budget: Budget,
        sampler_for: SamplerFor,
        *,
        start_with: tuple[Mapping[str, Any], ...] = (),
    ) -> None:
        known = study.get_trials(deepcopy=False)
        super().__init__(study, known)
        self._space, self._base, self._budget = space, base, budget
        self._sampler_for = sampler_for
        # What the machine failed, and what never got its configuration, is run again.
        sound = [t for t in known if trials.is_trained(t) and t.state != TrialState.FAIL]
        begun = {trial.user_attrs.get(trials.REFERENCE) for trial in sound}
        self._references = deque(r for r in references if r.name not in begun)
        started = {trial.user_attrs.get(trials.START_POINT) for trial in sound}
        points = enumerate(start_with, 1)
        self._points = deque((n, dict(point)) for n, point in points if n not in started)
        self.reference_numbers = {t.number for t in known if t.user_attrs.get(trials.REFERENCE)}
        self._seen = {_content(trials.mapping_of(t)): t.number for t in sound}
        self._num_begun = sum(self.is_ours(trial) for trial in sound)
        self.end: str | None = None
        self.is_exhausted = False

    def has_next(self) -> bool:
        """Return whether a trial is unfinished, or the budget allows a new one."""
        return bool(self._unfinished) or self._budget.end(self._num_begun) is None

    def is_ours(self, trial: FrozenTrial) -> bool:
        """Return whether a trial belongs to the search rather than to the finalists."""
        return trials.is_searched(trial)

    def _new_trial(self) -> Trial | None:
        self.end = self._budget.end(self._num_begun)
        if self.end is not None:
            return None
        trial: Trial | None
        if self._points:
            trial = self._start_point(*self._points.popleft())
        elif self._references:
            trial = self._reference(self._references.popleft())
        else:
            trial = self._sampled_until_new()
        self._num_begun += trial is not None
        return trial

    def _start_point(self, number: int, values: dict[str, Any]) -> Trial:
        trial = self._ask(self._sampler_for, values, **{trials.START_POINT: number})
        return self._described(trial, self._space.suggest(trial, self._base))

    def _reference(self, reference: FixedTrial) -> Trial:
        values = self._space.locate(reference.config, self._base)
        trial = self._ask(self._sampler_for, values, **{trials.REFERENCE: reference.name})
        if values is not None:
            self._space.suggest(trial, self._base)  # enters the parameters
        self.reference_numbers.add(trial.number)
        return self._described(trial, reference.config)

    def _sampled_until_new(self) -> Trial | None:
        for _ in range(MAX_UNTRAINED_IN_A_ROW):
            trial = self._ask(self._sampler_for)
            config, violated = self._suggested(trial)
            if config is None or any(violated.values()):
                self._tell_infeasible(trial, violated)
                continue
            former = self._seen.get(_content(config.to_mapping()))
            if former is not None:
                trial.set_user_attr(trials.NOT_TRAINED, f"{trials.DUPLICATE} {former}")
                # Nothing new is known of the point: samplers pass over what failed.
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                return self._described(trial, config)
        self.is_exhausted = True
        self.end = (
            f"{MAX_UNTRAINED_IN_A_ROW} points in a row broke a constraint or had been trained: "
            "the search space holds no more"
        )
        return None

    def _suggested(self, trial: Trial) -> tuple[TrialConfig | None, dict[str, float]]:
        """Return a configuration, None if invalid, and how far it violates each constraint."""
        try:
            config = self._space.suggest(trial, self._base)
        except ConfigError as error:
            return None, {str(error): 1.0}
        return config, self._space.violations(config)

    def _tell_infeasible(self, trial: Trial, violated: Mapping[str, float]) -> None:
        broken = {text: violation for text, violation in violated.items() if violation > 0}
        trial.set_user_attr(trials.NOT_TRAINED, f"{INFEASIBLE}: {', '.join(broken)}")
        for text, violation in broken.items():
            trial.set_constraint(text, violation)
        self.study.tell(trial, state=TrialState.PRUNED)

    def _described(self, trial: Trial, config: TrialConfig) -> Trial:
        self._seen.setdefault(_content(config.to_mapping()), trial.number)
        trials.describe(trial, config)
        return trial


class FinalistProposals(Proposals):
    """Repetitions of the finalists on new seeds; nothing is sampled.

    Args:
        study: The Optuna study.
        repetitions: Trainings to run, except those that an earlier run completed.
    """

    def __init__(self, study: optuna.Study, repetitions: tuple[FixedTrial, ...]) -> None:
        known = study.get_trials(deepcopy=False)
        names = {repetition.name for repetition in repetitions}
        self._names = names
        super().__init__(study, known)
        sound = [t for t in known if trials.is_trained(t) and t.state != TrialState.FAIL]
        begun = {trial.user_attrs.get(trials.FINALIST) for trial in sound}
        self._left = deque(r for r in repetitions if r.name not in begun)

    def has_next(self) -> bool:
        """Return whether a repetition is left."""
        return bool(self._unfinished or self._left)

    def is_ours(self, trial: FrozenTrial) -> bool:
        """Return whether a trial is one of the repetitions."""
        return trial.user_attrs.get(trials.FINALIST) in self._names

    def _new_trial(self) -> Trial | None:
        if not self._left:
            return None
        repetition = self._left.popleft()
        mark = {trials.FINALIST: repetition.name}
        trial = self._ask(lambda n: optuna.samplers.RandomSampler(seed=n), None, **mark)
        trials.describe(trial, repetition.config)
        return trial


def _content(config: Mapping[str, Any]) -> str:
    """Return a digest of what decides a trial's result; two of the same digest are duplicates."""
    return digest(deciding_settings(config, TRIAL_NOT_DECIDING))
