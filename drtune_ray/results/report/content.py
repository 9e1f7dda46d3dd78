"""Everything that a report says, gathered before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from drtune_ray.config.metric import Metric
from drtune_ray.results.evaluation_record import Evaluation
from drtune_ray.results.report.history import History
from drtune_ray.results.report.predictions import Predictions
from drtune_ray.results.report.settings import Axis, Importances
from drtune_ray.results.report.verdict import Candidate, Verdict
from drtune_ray.results.trials import TrialSummary


@dataclass(frozen=True)
class Content:
    """What a report says.

    Attributes:
        name: Name of the study.
        metric: Metric that chooses among trials.
        state: State of the study: running, done, ...
        written_ms: Time of the report, in milliseconds since 1970.
        num_trials: Number of trials that the search will have.
        num_epochs: Number of epochs of a trial that is not stopped early.
        num_images: Number of validation images; 0 if unknown.
        verdict: The result as sentences.
        leader: The winner, or the best trial so far; None if there is none.
        settings: Searched settings that it uses, by path.
        trials: All trials by number, repetitions of finalists included.
        finalists: Finalists with their values on new seeds, best first.
        history: What the trials did.
        axes: The searched settings.
        importances: What they explain.
        objectives: Direction of each objective by name.
        front: Numbers of the trials on the Pareto front.
        predictions: The winner on the validation images; None without.
        why_no_predictions: Why there are none.
        evaluation: Recorded result on the sealed split; None if it was not opened for this winner.
        openings: Recorded openings of that split, oldest first.
        facts: Further facts by name: images, backbone, version, ...
        notes: Sentences on what could not be read.
    """

    name: str
    metric: Metric
    state: str
    written_ms: int
    num_trials: int
    num_epochs: int
    num_images: int
    verdict: Verdict
    leader: TrialSummary | None
    settings: Mapping[str, Any]
    trials: tuple[TrialSummary, ...]
    finalists: tuple[Candidate, ...]
    history: History
    axes: tuple[Axis, ...]
    importances: Importances
    objectives: Mapping[str, str]
    front: tuple[int, ...]
    predictions: Predictions | None
    why_no_predictions: str
    evaluation: Evaluation | None
    openings: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def searched(self) -> tuple[TrialSummary, ...]:
        """Trials of the search, without the repetitions of finalists."""
        return tuple(trial for trial in self.trials if not trial.is_final)

    @cached_property
    def best_values(self) -> dict[int, float]:
        """Best value of the metric of each trial of the search that has one, by number."""
        known = ((trial.number, trial.best_value) for trial in self.searched)
        return {number: value for number, value in known if value is not None}
