"""Groups of a study's settings that are not those of a trial; `config.py` puts them together."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from drtune_ray.section import Probability, Section, Workers
from drtune_ray.server_uri import ServerUri


def study_name(name: str) -> str:
    """The name of a study or training, if it can be that of a folder.

    Raises:
        ValueError: If it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            "a name has letters, digits, '.', '_' and '-', a letter or digit first, and at most "
            f"100 of them, but got {name!r}"
        )
    return name


StudyName = Annotated[str, AfterValidator(study_name)]


class SamplerConfig(Section):
    """Optuna's sampler, and options of its own under the names that Optuna gives them.

    `num_startup_trials` are drawn at random first, by samplers that learn.
    """

    name: Literal["tpe", "gp", "cma_es", "qmc", "random", "nsga2", "nsga3"] = "tpe"
    num_startup_trials: PositiveInt = 6
    options: dict[str, Any] = {}


REFUSED_SCHEDULERS = {
    "pbt": "population-based training changes settings within a trial: no search algorithm can "
    "propose them",
    "pb2": "PB2 changes settings within a trial: no search algorithm can propose them",
    "hyperband": "it pauses trials, and a paused trial would be restarted at every rung",
    "bohb": "it pauses trials and brings a sampler of its own beside Optuna's",
}


def _scheduler(value: Any) -> Any:
    if isinstance(value, str) and value.lower() in REFUSED_SCHEDULERS:
        raise ValueError(
            f"{value!r} cannot work: {REFUSED_SCHEDULERS[value.lower()]}; take asha, median or none"
        )
    return value


class SchedulerConfig(Section):
    """Early stopping.

    ``asha`` with its r (`min_epochs`) and eta (`reduction_factor`); ``median`` stops after
    `min_epochs` what is below the median of at least `min_trials` others; ``none``. By default
    `min_epochs` is a third of the epochs: before that, learning rates that end best look bad.
    """

    name: Annotated[Literal["asha", "median", "none"], BeforeValidator(_scheduler)] = "asha"
    min_epochs: PositiveInt | None = None
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    min_trials: PositiveInt = 4

    def first_rung(self, max_epochs: int) -> int:
        """Epochs that every trial has, where it may have `max_epochs`."""
        return min(self.min_epochs or max(2, round(max_epochs / 3)), max_epochs)


class BudgetConfig(Section):
    """When a search ends, beside its number of trials: whichever comes first (None: never).

    `max_epochs` of all trials together; `max_seconds` of searching, over all runs of the study;
    `target_accuracy` on the validation images; `patience_trials` in a row that were no better.
    """

    max_epochs: PositiveInt | None = None
    max_seconds: PositiveFloat | None = None
    target_accuracy: Probability | None = None
    patience_trials: PositiveInt | None = None


class FinalistsConfig(Section):
    """What follows the search: its best configurations, and CE-tuning, again on new seeds.

    The winner is the one with the best mean over the `num_seeds` seeds; with 0 it is the maximum
    of the search, which flatters, and is said to be.
    """

    num_configurations: PositiveInt = 2
    num_seeds: Annotated[int, Field(ge=0)] = 2


class FinalFitConfig(Section):
    """What is handed back: the winner's best seed, or its configuration trained once more.

    With `images` ``all`` the winner's configuration trains again on training and validation images
    together, to the epoch at which it was best; ``none`` leaves that out. `workers` as in
    `TrainingConfig`, ``[min, max]`` included; None: as many as a trial of the study.
    """

    images: Literal["none", "all"] = "none"
    workers: Workers | None = None


class ResourcesConfig(Section):
    """What a worker of a trial takes, and how many trials run at a time (None: as many as fit).

    `cpus_per_worker` sets torch's threads too. GPUs are given a worker or a trial
    (`gpus_per_trial`, divided among its workers); a fraction lets several trials of one worker
    share a device. A trial may wait `wait_seconds` for its resources; one that does nothing for
    `hang_seconds` is taken for hung and started again from its last save point.
    """

    trials_at_a_time: PositiveInt | None = None
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: NonNegativeFloat = 0.0
    gpus_per_trial: NonNegativeFloat | None = None
    wait_seconds: PositiveFloat = 1800.0
    hang_seconds: PositiveFloat = 1800.0

    @model_validator(mode="after")
    def _gpus_are_given_once(self) -> Self:
        if self.gpus_per_trial is not None and self.gpus_per_worker:
            raise ValueError(
                "gpus_per_trial and gpus_per_worker say the same, but got "
                f"{self.gpus_per_trial:g} and {self.gpus_per_worker:g}: give one of them"
            )
        return self

    def worker_gpus(self, workers: int) -> float:
        """GPUs of a worker of a trial that has so many of them."""
        if self.gpus_per_trial is not None:
            return self.gpus_per_trial / workers
        return self.gpus_per_worker


class TrackingConfig(Section):
    """Where MLflow records; None is SQLite under the storage."""

    uri: ServerUri | None = None
    experiment: str = "drtune-ray"
    num_top_checkpoints: Annotated[int, Field(ge=0)] = 3
