"""Groups of a study's settings that are not those of a trial; `StudyConfig` puts them together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
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

from drtune_ray.config.presets import PRESETS
from drtune_ray.config.section import Probability, Section, Workers, not_a_mapping, validated
from drtune_ray.config.trial import TrialConfig, on_preset
from drtune_ray.errors import ConfigError
from drtune_ray.server_uri import ServerUri
from drtune_ray.values import deep_merge, full_path

ReferenceName = Literal["default", "ce_tuning", "authors", "paper"]
ObjectiveName = Literal[
    "val_accuracy",
    "worst_class_accuracy",
    "calibration_error",
    "latency_ms",
    "num_parameters",
    "flops",
]
STUDY, TRAINING = "study", "training"


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


class StudyConfig(Section):
    """A search over trials.

    `trial` is the configuration that the search space varies; `space` the name of a shipped search
    space, a YAML file, or its content (see `drtune_ray.space.search_space`).

    `optuna_storage` is the URL of a database that holds the search (None: a file in the study's
    folder), `artifacts` the URI of a folder or object store for all that the next driver needs and
    nodes without a common file system hand each other (None: everything lies under `storage`).

    Of several `objectives` validation accuracy is the first: early stopping, the finalists and the
    winner go by it, and the others are weighed against it in the Pareto front.

    `start_with` are points of the space to run first; what one leaves open is sampled.
    `warm_start` names studies of comparable trials for the sampler to learn from.
    """

    name: StudyName
    storage: str = "./drtune-studies"
    optuna_storage: ServerUri | None = None
    artifacts: ServerUri | None = None
    trial: TrialConfig
    space: str | dict[str, Any] = "quick"
    objectives: tuple[ObjectiveName, ...] = ("val_accuracy",)
    trials: PositiveInt = 20
    start_with: tuple[dict[str, Any], ...] = ()
    warm_start: tuple[str, ...] = ()
    seed: int = 0
    reference_trials: tuple[ReferenceName, ...] = ("default", "ce_tuning", "authors")
    sampler: SamplerConfig = SamplerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    budget: BudgetConfig = BudgetConfig()
    finalists: FinalistsConfig = FinalistsConfig()
    final_fit: FinalFitConfig = FinalFitConfig()
    resources: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _references_fit(self) -> Self:
        if len(set(self.reference_trials)) != len(self.reference_trials):
            raise ValueError(f"reference_trials must differ, but got {list(self.reference_trials)}")
        num_given = len(self.reference_trials) + len(self.start_with)
        if num_given > self.trials:
            what = "reference_trials and start_with" if self.start_with else "reference_trials"
            points = f" and {len(self.start_with)} points of your own" if self.start_with else ""
            raise ValueError(
                f"trials >= number of {what} must hold, but got "
                f"trials={self.trials} with {len(self.reference_trials)} reference trials{points}; "
                f"set trials to at least {num_given} or shorten {what}"
            )
        return self

    @model_validator(mode="after")
    def _accuracy_comes_first(self) -> Self:
        if self.objectives[:1] != ("val_accuracy",):
            raise ValueError(
                f"objectives must begin with val_accuracy, but got {list(self.objectives)}: early "
                "stopping, the finalists and the winner go by it"
            )
        if len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives must differ, but got {list(self.objectives)}")
        if len(self.objectives) > 1 and self.sampler.name == "cma_es":
            raise ValueError(
                "sampler.name=cma_es takes one objective, but got "
                f"{list(self.objectives)}: take tpe, gp, nsga2 or nsga3"
            )
        return self

    @model_validator(mode="after")
    def _workers_are_fixed(self) -> Self:
        training = self.trial.training
        if training.min_workers != training.max_workers:
            raise ValueError(
                "a study needs one number of workers, but got trial.training.workers="
                f"[{training.min_workers}, {training.max_workers}]; a range is for "
                "`drtune-ray train`"
            )
        return self

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Validate a nested mapping; ``trial`` may name a ``preset``.

        Raises:
            ConfigError: Naming every problem.
        """
        merged = dict(values)
        trial = merged.get("trial") or {}
        if not isinstance(trial, Mapping):
            raise ConfigError(not_a_mapping("trial", trial))
        merged["trial"] = on_preset(trial, "default")
        return validated(cls, merged)

    @property
    def folder(self) -> Path:
        """The study's folder under the storage."""
        return full_path(self.storage) / self.name

    def to_mapping(self) -> dict[str, Any]:
        """Nested plain values, as they stand in YAML."""
        return self.model_dump(mode="json")


def reference_config(base: TrialConfig, reference: str) -> TrialConfig:
    """A reference trial: a preset's method and recipe on `base`'s backbone, epochs and data.

    Args:
        base: The study's trial configuration.
        reference: ``ce_tuning`` or the name of a preset.
    """
    if reference == "ce_tuning":
        return base.with_values({"method.name": "ce_tuning"})
    if reference == "default":
        return base.with_values({"method.name": "dr_tune"})
    preset = PRESETS[reference]
    training = deep_merge(base.training.model_dump(), preset["training"])
    if base.training.max_workers > 1:  # statistics of a part of the batch would be another method
        training["batch_norm"] = base.training.batch_norm
    optim = {"name": base.optim.name, "backbone_lr": base.optim.backbone_lr}
    return validated(
        TrialConfig,
        base.model_dump()
        | {
            "method": preset["method"],
            "optim": deep_merge(optim, preset.get("optim", {})),
            "training": training,
        },
    )
