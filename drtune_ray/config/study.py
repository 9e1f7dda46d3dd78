"""Settings of a study: its trial configuration and everything around the trials."""

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

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS
from drtune_ray.config.presets import PRESETS
from drtune_ray.config.section import Probability, Section, Workers, not_a_mapping, validated
from drtune_ray.config.trial import TrialConfig, on_preset
from drtune_ray.errors import ConfigError
from drtune_ray.server_uri import ServerUri
from drtune_ray.values import deep_merge, full_path

SamplerName = Literal["tpe", "gp", "cma_es", "qmc", "random", "nsga2", "nsga3"]
ReferenceName = Literal["default", "ce_tuning", "authors", "paper"]
ObjectiveName = Literal[
    "val_accuracy",
    "balanced_accuracy",
    "macro_f1",
    "auroc",
    "log_loss",
    "worst_class_accuracy",
    "calibration_error",
    "latency_ms",
    "num_parameters",
    "flops",
]
STUDY, TRAINING = "study", "training"
RECORD_FILE = "study.yaml"


# What else lies under a storage or artifacts: MLflow's store, tables, splits, openings.
SHARED_NAMES = ("mlartifacts", "cache", "splits", "test-openings", "test-openings.jsonl")
SHARED_PREFIX = "mlflow.db"  # and the files that SQLite writes beside it


def study_name(name: str) -> str:
    """Return the name of a study or training if a folder can have it.

    Raises:
        ValueError: If not.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            "a name has letters, digits, '.', '_' and '-', a letter or digit first, and at most "
            f"100 of them, but got {name!r}"
        )
    # On some file systems upper and lower case are the same.
    if name.lower() in SHARED_NAMES or name.lower().startswith(SHARED_PREFIX):
        raise ValueError(
            f"{name!r} is the name of a file or folder that all studies of a storage share: "
            "choose another"
        )
    return name


StudyName = Annotated[str, AfterValidator(study_name)]


class SamplerConfig(Section):
    """Sampler: how the search proposes its next trial."""

    name: SamplerName = "tpe"
    """Sampler that proposes the trials; `cma_es` needs the package cmaes. [Optuna samplers]"""

    num_startup_trials: PositiveInt = 6
    """Trials drawn at random first; read by `tpe`, `gp` and `cma_es`.
    [Optuna `n_startup_trials`]"""

    options: dict[str, Any] = {}
    """Further options of the sampler under Optuna's names. [Optuna samplers]"""


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
    """Scheduler: early stopping of trials that promise little."""

    name: Annotated[Literal["asha", "median", "none"], BeforeValidator(_scheduler)] = "asha"
    """Early stopping: `asha`, `median` (median stopping rule), or `none`. [Ray Tune
    `AsyncHyperBandScheduler`, `MedianStoppingRule`]"""

    min_epochs: PositiveInt | None = None
    """Epochs that every trial completes before it may be stopped. Default: a third of
    the epochs, at least 2, because earlier the best learning rates still look bad. [ASHA's r]"""

    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """Factor between rungs: about one trial in so many passes each rung; read by `asha` only.
    [ASHA's eta]"""

    min_trials: PositiveInt = 4
    """Other trials that an epoch's median needs; read by `median` only.
    [Ray Tune `min_samples_required`]"""

    def first_rung(self, max_epochs: int) -> int:
        """Return the epochs that every trial of at most `max_epochs` completes."""
        return min(self.min_epochs or max(2, round(max_epochs / 3)), max_epochs)


class BudgetConfig(Section):
    """Limits at which a search ends, beside its number of trials; the first one reached counts."""

    max_epochs: PositiveInt | None = None
    """Epochs of all trials together after which the search ends. Default: no limit."""

    max_seconds: PositiveFloat | None = None
    """Seconds of searching after which the search ends, over all runs of the study.
    Default: no limit."""

    target_accuracy: Probability | None = None
    """Validation accuracy, 0 to 1, at which the search ends, where `val_accuracy` is the first
    objective. Default: none."""

    patience_trials: PositiveInt | None = None
    """Trials in a row without a better value after which the search ends. Default: no limit."""


class FinalistsConfig(Section):
    """Finals after the search: the best configurations, and CE-tuning, again on new seeds.

    The configuration with the best mean over the new seeds wins. Without finals the best trial of
    the search wins, whose accuracy is a maximum and therefore reported as optimistic.
    """

    num_configurations: PositiveInt = 2
    """Best configurations of the search that enter the finals; CE-tuning enters as well."""

    num_seeds: Annotated[int, Field(ge=0, le=1000)] = 2
    """New random seeds on which each finalist is trained; 0 holds no finals."""


class FinalFitConfig(Section):
    """Final fit: the winner's configuration once more, to the epoch at which it was best."""

    images: Literal["none", "all"] = "none"
    """Images of the final fit: `all` trains again on training and validation images together,
    `none` skips it and returns the winner's best seed."""

    workers: Workers | None = None
    """Ray Train workers of the final fit, a number or [min, max]. Default: as many as a trial.
    [Ray Train `ScalingConfig`]"""


class ResourcesConfig(Section):
    """Resources of the trials on the cluster."""

    trials_at_a_time: PositiveInt | None = None
    """Trials that run at the same time. Default: as many as fit. [Ray Tune
    `max_concurrent_trials`]"""

    cpus_per_worker: PositiveInt = 1
    """CPUs of each worker, which are also its torch threads. [Ray resources]"""

    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs of each worker; a fraction lets trials of one worker share a GPU. [Ray resources]"""

    gpus_per_trial: NonNegativeFloat | None = None
    """GPUs of each trial, divided among its workers. Default: by `gpus_per_worker`.
    [Ray resources]"""

    wait_seconds: PositiveFloat = 1800.0
    """Seconds that a trial waits for its resources before the study gives up."""

    hang_seconds: PositiveFloat = 1800.0
    """Seconds without progress after which a trial counts as hung and restarts from its last
    checkpoint."""

    @model_validator(mode="after")
    def _gpus_are_given_once(self) -> Self:
        if self.gpus_per_trial is not None and self.gpus_per_worker:
            raise ValueError(
                "gpus_per_trial and gpus_per_worker say the same, but got "
                f"{self.gpus_per_trial:g} and {self.gpus_per_worker:g}: give one of them"
            )
        return self

    def worker_gpus(self, workers: int) -> float:
        """Return the GPUs of each worker of a trial with so many workers."""
        if self.gpus_per_trial is not None:
            return self.gpus_per_trial / workers
        return self.gpus_per_worker


class TrackingConfig(Section):
    """Records in MLflow."""

    uri: ServerUri | None = None
    """MLflow server, http(s)://HOST:PORT, or database URL. Default: a SQLite file under the
    storage. [MLflow tracking URI]"""

    experiment: str = "drtune-ray"
    """Name of the MLflow experiment. [MLflow]"""

    num_top_checkpoints: Annotated[int, Field(ge=0)] = 3
    """Best trials whose weights are copied to MLflow. [MLflow artifacts]"""


class StudyConfig(Section):
    """Configuration of a study: a search over trials.

    Early stopping, the finalists and the winner go by the first of the `objectives`, a metric that
    each epoch measures; the others are weighed against it in the Pareto front.
    """

    name: StudyName
    """Name of the study and of its folder under the storage. Default: the data folder's name."""

    storage: str = "./drtune-studies"
    """Folder for everything that is written; without `artifacts` all nodes must reach it."""

    optuna_storage: ServerUri | None = None
    """URL of a database that holds the search. Default: a file in the study's folder.
    [Optuna `RDBStorage`, `JournalStorage`]"""

    artifacts: ServerUri | None = None
    """URI (s3://, gs://, abfss://, file://) of a folder or object store for what nodes without a
    common file system exchange and the next driver needs. Default: the storage.
    [PyArrow `FileSystem`]"""

    trial: TrialConfig
    """Trial configuration that the search space varies."""

    space: str | dict[str, Any] = "quick"
    """Search space: the name of a shipped one (quick, dr_tune, ...), a YAML file, or its
    content."""

    objectives: tuple[ObjectiveName, ...] = ("val_accuracy",)
    """Objectives of the search; the first chooses epochs, trials and winner, as the trial's
    `training.metric`. Several give a Pareto front. [Optuna multi-objective studies]"""

    trials: PositiveInt = 20
    """Number of trials, reference trials included and finalists not."""

    start_with: tuple[dict[str, Any], ...] = ()
    """Points of the space that run first; what a point leaves open is sampled.
    [Optuna `enqueue_trial`]"""

    warm_start: tuple[str, ...] = ()
    """Earlier studies, by name or folder, from whose comparable trials the sampler learns.
    [Optuna `add_trial`]"""

    seed: int = 0
    """Random seed of the sampler; `trial.seed` and `trial.data.view_seed` are separate."""

    reference_trials: tuple[ReferenceName, ...] = ("default", "ce_tuning", "authors")
    """Trials that every search starts with: presets, and CE-tuning as the baseline; never stopped
    early. [ICCV 2023; authors' code]"""

    sampler: SamplerConfig = SamplerConfig()
    """Sampler of the search."""

    scheduler: SchedulerConfig = SchedulerConfig()
    """Early stopping of trials."""

    budget: BudgetConfig = BudgetConfig()
    """Limits at which the search ends."""

    finalists: FinalistsConfig = FinalistsConfig()
    """Finals after the search."""

    final_fit: FinalFitConfig = FinalFitConfig()
    """Final fit of the winner's configuration."""

    resources: ResourcesConfig = ResourcesConfig()
    """Resources of the trials."""

    tracking: TrackingConfig = TrackingConfig()
    """Records in MLflow."""

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
    def _first_objective_chooses(self) -> Self:
        if not self.objectives or self.objectives[0] not in METRICS:
            raise ValueError(
                f"objectives must begin with one of {', '.join(METRICS)}, but got "
                f"{list(self.objectives)}: early stopping, the finalists and the winner go by it"
            )
        if (metric := self.trial.training.metric) != self.objectives[0]:
            raise ValueError(
                f"trial.training.metric={metric} must be the first of the objectives, but got "
                f"{list(self.objectives)}: leave one of them out"
            )
        if self.budget.target_accuracy is not None and metric != DEFAULT_METRIC:
            raise ValueError(
                f"budget.target_accuracy needs {DEFAULT_METRIC} as first objective, but got "
                f"{list(self.objectives)}: leave it out"
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
        _share_metric(merged, trial)
        merged["trial"] = on_preset(merged["trial"], "default")
        return validated(cls, merged)

    @property
    def folder(self) -> Path:
        """Folder of the study under the storage."""
        return full_path(self.storage) / self.name

    def to_mapping(self) -> dict[str, Any]:
        """Return nested plain values, as YAML holds them."""
        return self.model_dump(mode="json")


def _share_metric(study: dict[str, Any], trial: Mapping[str, Any]) -> None:
    """Set the trial's metric to the first objective, or the objectives to the trial's metric.

    What is given both times is left to the validators, and so is what has a wrong type.
    """
    training, objectives = trial.get("training") or {}, study.get("objectives")
    study["trial"] = trial
    if not isinstance(training, Mapping):
        return
    if "metric" not in training and isinstance(objectives, list | tuple) and objectives:
        if objectives[0] in METRICS:
            study["trial"] = {**trial, "training": {**training, "metric": objectives[0]}}
    elif "metric" in training and objectives is None:
        study["objectives"] = [training["metric"]]


def reference_config(base: TrialConfig, reference: str) -> TrialConfig:
    """Return a reference trial: a preset's method and recipe on `base`'s backbone and data.

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
    if base.training.max_workers > 1 or base.training.accumulation_steps > 1:
        # Statistics of a part of the batch would be another method.
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
