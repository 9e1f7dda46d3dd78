"""The resident actor: runs one-worker trials one after another in one warm process.

Process, torch, memory-mapped tables and the pretrained weights stay. Everything that a trial
changes is built anew for each, so that the third trial of an actor equals the same trial in a fresh
process bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ray import tune

from drtune_ray.config.trial import TrialConfig
from drtune_ray.execution.guard import WorkerGuard
from drtune_ray.execution.worker import TrialRunner
from drtune_ray.execution.worker_context import WorkerContext, trial_of
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.reports import (
    CONFIG_NUMBER,
    EpochReport,
    SavePoint,
    failed_by_point,
    outcome_of_settings,
    trial_result,
)


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """Class trainable of Ray Tune; one step is one epoch."""

    def setup(self, config: dict[str, Any], context: WorkerContext) -> None:
        """Open what the trials share, and start the first one."""
        self._epochs: Iterator[EpochReport | SavePoint] = iter(())
        self._last: dict[str, Any] | None = None
        self._settle: Callable[[], None] = _nothing_is_due
        self._guard = WorkerGuard(context.study_id, context.hang_seconds)
        with self._guard.guarding(context.folder(config[CONFIG_NUMBER]).path):
            self._runner = TrialRunner(context)
            self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial in the same process."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train until the end of the next epoch.

        A failure that the configuration causes becomes a result; only failures of the machine are
        exceptions, which Tune retries.

        Raises:
            Preempted: If the process must leave; everything is saved.
        """
        self._guard.leave_if_told(self._settle)
        try:
            with self._guard.guarding(self._folder.path):
                for event in self._epochs:
                    event.save(self._folder)
                    self._settle = event.settle
                    if isinstance(event, EpochReport):
                        self._last = trial_result(event, self._runner.context.num_threads)
                        return self._last
                    self._guard.leave_if_told(self._settle)
        except Exception as error:
            if (outcome := outcome_of_settings(error)) is None:
                raise
            return failed_by_point(outcome, self._last)
        raise RuntimeError("the trial ended without saying how")

    def cleanup(self) -> None:
        """Drop the trial."""
        self._epochs, self._settle = iter(()), _nothing_is_due

    def _begin(self, config: dict[str, Any]) -> None:
        trial = trial_of(config)
        self._folder = self._runner.context.folder(config[CONFIG_NUMBER])
        self._last = None
        self._settle = _nothing_is_due
        self._epochs = self._first_step_begins(trial, self._folder)

    def _first_step_begins(
        self, trial: TrialConfig, folder: TrialFolder
    ) -> Iterator[EpochReport | SavePoint]:
        # If an actor takes long to start, Tune may give its trial to another one that became free.
        # Only the actor that steps may touch the trial's folder.
        yield from self._runner.epochs(trial, folder, self._guard)


def _nothing_is_due() -> None:
    """Settle a trial that has saved nothing yet."""
