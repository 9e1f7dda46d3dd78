"""Ray Tune's searcher over an Optuna study, which holds the truth.

A trial is identified by its Optuna number. `search.proposals` chooses the next one;
`search.outcomes` records what became of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from optuna.trial import Trial
from ray.tune.search import Searcher

from drtune_ray.results.trials import CONFIG
from drtune_ray.search.outcomes import Outcomes
from drtune_ray.search.proposals import Proposals
from drtune_ray.training.reports import CONFIG_NUMBER, CONFIG_TRIAL, OBJECTIVE


class StudySearch(Searcher):  # type: ignore[misc]
    """Gives Tune one trial after another and records what became of each.

    Args:
        proposals: Chooses the next trial.
        outcomes: Records in Optuna what became of a trial.
    """

    def __init__(self, proposals: Proposals, outcomes: Outcomes) -> None:
        # Tune shows and sorts nothing by it, and the scheduler has its own mode.
        super().__init__(metric=OBJECTIVE, mode="max")
        self.study, self.proposals, self._outcomes = proposals.study, proposals, outcomes
        self._end: Exception | None = None
        self._active: dict[str, Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes it to disks, and the address of the storage holds a password."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the next trial as Tune's config, or FINISHED."""
        trial = self.proposals.next()
        if trial is None:
            return str(Searcher.FINISHED)
        self._active[trial_id] = trial
        return {CONFIG_NUMBER: trial.number, CONFIG_TRIAL: trial.user_attrs[CONFIG]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record the best value so far, by epoch."""
        if trial := self._active.get(trial_id):
            self._outcomes.report(trial, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record what became of the trial; without a result it stays unfinished.

        For an error Tune passes no details here; see `fail`.
        """
        if error or not result or trial_id not in self._active or self._end is not None:
            return
        with self._error_kept():
            self._outcomes.tell(self._active[trial_id], result)
            del self._active[trial_id]

    def fail(self, trial_id: str, outcome: str) -> None:
        """Record that the machine failed a trial for the last time, and how.

        After `end_with` it stays unfinished.
        """
        if self._end is not None:
            return
        if trial := self._active.pop(trial_id, None):
            with self._error_kept():
                self._outcomes.tell_failure(trial, outcome)

    def end_with(self, error: Exception) -> None:
        """End the study at the next `check_storage`, and record no further trial."""
        self._end = error

    def check_storage(self) -> None:
        """Raise the error that ended the study; called where an exception ends Tune's loop.

        Raises:
            Exception: The one given to `end_with`; or what Optuna's storage raised before, where
                Tune would have taken it for an error of the trial.
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
