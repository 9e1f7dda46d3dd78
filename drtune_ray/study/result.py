"""The plan of a study, before it runs, and its result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drtune_ray.config.metric import DEFAULT_METRIC
from drtune_ray.config.study import StudyConfig
from drtune_ray.results.evaluation_record import WEIGHTS_NAME
from drtune_ray.results.trials import TrialSummary, best_trial, trials_table
from drtune_ray.search.finalists import Finalist, best_finalist
from drtune_ray.storage.record import EPOCHS_NAME, TRIALS_NAME, WINNER_NAME
from drtune_ray.training.reports import COMPLETED

if TYPE_CHECKING:
    import pandas

SEARCH, FINALISTS = "search", "finalists"


@dataclass(frozen=True, repr=False)
class StudyResult:
    """Result of a study; docs/python.md describes it for scripts and notebooks.

    Attributes:
        folder: Folder of the study.
        study_id: Id of the study, which marks its runs in MLflow.
        trials: All trials by number, repetitions of the finalists included.
        finalists: Finalists with their values on new seeds; empty if the study has none.
        winner: Winning trial of the search: by its mean over new seeds, or without finalists by
            the best of the completed trials, each trained on one seed.
        shipped: Trial whose weights are shipped: the winner's best seed.
        pareto_front: Pareto front of several objectives; else empty.
        end: Why the search ended; None if it ended in an earlier run.
        num_unsent: Number of events that the tracking server has not received yet.
        was_done: Whether nothing was left to run.
        searched: Paths of the settings that the search space varies.
        settings: Searched settings that the winner uses, with its values.
        seconds: Duration of this run in seconds.
        final_fit: Entry of the final fit in the model's card; None if the study has none.
    """

    folder: Path
    study_id: str
    trials: tuple[TrialSummary, ...]
    finalists: tuple[Finalist, ...]
    winner: TrialSummary
    shipped: TrialSummary
    pareto_front: tuple[TrialSummary, ...]
    end: str | None
    num_unsent: int
    was_done: bool
    searched: tuple[str, ...]
    settings: dict[str, Any]
    seconds: float
    final_fit: dict[str, Any] | None = None

    def __repr__(self) -> str:
        winner, value = self.winner, self.winner.best_value or 0.0
        figure = f"{value:.2%}" if winner.metric.is_share else f"{value:.4f}"
        return (
            f"<StudyResult of {self.folder.name!r}: {len(self.searched_trials)} trials, winner "
            f"trial {winner.label} with {winner.metric.label} {figure}; {self.folder}>"
        )

    @property
    def best_trial(self) -> TrialSummary:
        """Completed trial of the search with the best value, an optimistic one."""
        return best_trial(self.trials)

    @property
    def model_path(self) -> Path:
        """File of the shipped weights; `model.yaml` is next to it."""
        return self.folder / WINNER_NAME / WEIGHTS_NAME

    @property
    def trials_path(self) -> Path:
        """Parquet file with one row per trial."""
        return self.folder / TRIALS_NAME

    @property
    def epochs_path(self) -> Path:
        """Parquet file with one row per epoch of a trial."""
        return self.folder / EPOCHS_NAME

    def trials_dataframe(self) -> pandas.DataFrame:
        """Return all trials as a data frame, one row each, with a column for each setting."""
        frame: pandas.DataFrame = trials_table(self.trials).to_pandas()
        return frame

    @property
    def is_fitted_again(self) -> bool:
        """Whether the shipped weights are those of the final fit."""
        return self.final_fit is not None and self.final_fit["outcome"] == COMPLETED

    def about(self) -> dict[str, Any]:
        """Return how the winner was measured and chosen, as plain values.

        The value of the shipped weights stands under the name of the metric that chose, such as
        `val_accuracy`; it is None for a final fit, which leaves only the test split to measure on.
        """
        is_again, metric = self.is_fitted_again, self.winner.metric
        about: dict[str, Any] = {
            "study": self.folder.name,
            "study_id": self.study_id,
            "trial": self.winner.number,
            "shipped_trial": None if is_again else self.shipped.number,
            "metric": self.winner.config["training"].get("metric", DEFAULT_METRIC),
            metric.measure: None if is_again else self.shipped.best_value,
            metric.best: self.winner.best_value,
        }
        if self.final_fit is not None:
            about["final_fit"] = self.final_fit
        finalist = best_finalist(self.finalists)
        if finalist is None:
            chosen = f"best {metric.label} of the completed trials, one seed each"
            if self.finalists:
                chosen += "; no finalist completed on every new seed"
            return about | {"chosen": chosen}
        return about | {
            f"mean_{metric.measure}": finalist.mean,
            f"spread_{metric.measure}": finalist.spread,
            "seeds": [run.config["seed"] for run in finalist.runs],
            "chosen": f"best mean {metric.label} of {len(self.finalists)} finalists over "
            f"{finalist.num_seeds} new seeds" + ("" if is_again else "; its best seed is shipped"),
        }

    @property
    def searched_trials(self) -> tuple[TrialSummary, ...]:
        """Trials of the search, without the repetitions of the finalists."""
        return tuple(trial for trial in self.trials if not trial.is_final)

    @property
    def references(self) -> tuple[TrialSummary, ...]:
        """Reference trials."""
        return tuple(trial for trial in self.trials if trial.reference)


@dataclass(frozen=True)
class StudyPlan:
    """Plan of one part of a study, announced before its first trial.

    Attributes:
        config: The study.
        part: `SEARCH` or `FINALISTS`.
        num_trials: Number of trials of the part.
        num_done: Number of them that earlier runs finished.
        trials_at_a_time: Number of trials that run side by side.
        searched: Paths of the settings that the search space varies.
        notes: Sentences about the plan.
    """

    config: StudyConfig
    part: str
    num_trials: int
    num_done: int
    trials_at_a_time: int
    searched: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def of_part(self, trials: Iterable[TrialSummary]) -> tuple[TrialSummary, ...]:
        """Return the trials that belong to the part."""
        return tuple(trial for trial in trials if trial.is_final == (self.part == FINALISTS))
