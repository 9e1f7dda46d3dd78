"""What is told of a study before it runs and after: its plan and its result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drtune_ray.config.study import StudyConfig
from drtune_ray.results.trials import TrialSummary
from drtune_ray.search.finalists import Finalist, best_finalist
from drtune_ray.training.reports import COMPLETED

SEARCH, FINALISTS = "search", "finalists"


@dataclass(frozen=True)
class StudyResult:
    """What a study came to.

    Attributes:
        folder: Where it lies.
        study_id: Marks its runs in MLflow.
        trials: All that were run, by number, repetitions of the finalists included.
        finalists: What the search's best reached on new seeds; empty where none were asked for.
        winner: The trial of the search that won: by its mean over new seeds, or without
            finalists as the maximum over the completed trials, each trained on one seed.
        shipped: The trial whose weights are handed back: the winner's best seed.
        pareto_front: Of several objectives; else empty.
        end: Why the search ended; None where an earlier run ended it.
        num_unsent: Events that the tracking server has not taken yet.
        was_done: Whether there was nothing left to run.
        searched: Paths that the search space varies.
        settings: Those of them that the winner uses, with its values.
        seconds: How long this run took.
        final_fit: What the model's card says of the final fit; None where none was asked for.
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

    @property
    def is_fitted_again(self) -> bool:
        """Whether the weights of the final fit are handed back."""
        return self.final_fit is not None and self.final_fit["outcome"] == COMPLETED

    def about(self) -> dict[str, Any]:
        """What was measured of the winner, and how it was chosen: plain values.

        `val_accuracy` is that of the weights: None of a final fit, which leaves nothing to
        measure it on but the test split.
        """
        is_again = self.is_fitted_again
        about: dict[str, Any] = {
            "study": self.folder.name,
            "study_id": self.study_id,
            "trial": self.winner.number,
            "shipped_trial": None if is_again else self.shipped.number,
            "val_accuracy": None if is_again else self.shipped.best_val_accuracy,
            "best_val_accuracy": self.winner.best_val_accuracy,
        }
        if self.final_fit is not None:
            about["final_fit"] = self.final_fit
        finalist = best_finalist(self.finalists)
        if finalist is None:
            chosen = "maximum validation accuracy over the completed trials, one seed each"
            if self.finalists:
                chosen += "; no finalist completed on every new seed"
            return about | {"chosen": chosen}
        return about | {
            "mean_val_accuracy": finalist.mean,
            "spread_val_accuracy": finalist.spread,
            "seeds": [run.config["seed"] for run in finalist.runs],
            "chosen": f"best mean validation accuracy of {len(self.finalists)} finalists over "
            f"{finalist.num_seeds} new seeds" + ("" if is_again else "; its best seed is shipped"),
        }

    @property
    def searched_trials(self) -> tuple[TrialSummary, ...]:
        """Without the repetitions of the finalists."""
        return tuple(trial for trial in self.trials if not trial.is_final)

    @property
    def references(self) -> tuple[TrialSummary, ...]:
        """The reference trials."""
        return tuple(trial for trial in self.trials if trial.reference)


@dataclass(frozen=True)
class StudyPlan:
    """Told to the observer before the first trial of each part of the study.

    Attributes:
        config: The study.
        part: `SEARCH` or `FINALISTS`.
        num_trials: Of the part.
        num_done: Those of them that earlier runs finished.
        trials_at_a_time: How many run side by side.
        searched: Paths that the search space varies.
        notes: Sentences about it.
    """

    config: StudyConfig
    part: str
    num_trials: int
    num_done: int
    trials_at_a_time: int
    searched: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def of_part(self, trials: Iterable[TrialSummary]) -> tuple[TrialSummary, ...]:
        """The trials that belong to the part."""
        return tuple(trial for trial in trials if trial.is_final == (self.part == FINALISTS))
