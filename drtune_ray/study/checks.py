"""The checks of a study that need no cluster."""

from __future__ import annotations

from typing import Any

from drtune_ray.config.study import StudyConfig, reference_config
from drtune_ray.config.training import TrainingConfig
from drtune_ray.errors import ConfigError
from drtune_ray.execution.capacity import WORKERS, trial_demand
from drtune_ray.search.proposals import FixedTrial
from drtune_ray.search.samplers import check_sampler
from drtune_ray.space.search_space import SearchSpace, read_space, start_points
from drtune_ray.storage.optuna_storage import check_database
from drtune_ray.study.drops import check_searched_drops
from drtune_ray.study.final_fit import with_final_workers
from drtune_ray.study.inputs import StudyInputs, check_encoders, check_inputs
from drtune_ray.study.tables import table_variants
from drtune_ray.tracking.mlflow_recorder import check_tracking, ignored_variables
from drtune_ray.training.model import check_trial
from drtune_ray.values import full_path


def check_study(
    config: StudyConfig,
) -> tuple[StudyInputs, SearchSpace, tuple[FixedTrial, ...], tuple[str, ...]]:
    """Check a study without a cluster; return inputs, space, reference trials and notes.

    Nothing is written.

    Raises:
        ConfigError: Naming every problem.
        EnvironmentProblem: If weights cannot be fetched.
    """
    found: list[SearchSpace] = []
    checked = check_inputs(
        config.trial,
        full_path(config.storage),
        [
            lambda: found.append(SearchSpace.from_mapping(space_content(config), config.trial)),
            lambda: check_sampler(config.sampler),
            lambda: trial_demand(config.trial.training, config.resources),
            lambda: check_database(config.optuna_storage),
            lambda: check_tracking(config.tracking.uri),
        ],
        config.resources,
        config.objectives,
    )
    highest = checked.num_train
    space, notes = found[0].clamped(highest, len(checked.splits.classes))
    _check_final_fit(config, highest)
    start_points(space, config.start_with)
    checked = check_encoders(checked, table_variants(space, config.trial)[1:])
    check_searched_drops(space, config.trial, checked)
    references = []
    for name in config.reference_trials:
        trial = reference_config(config.trial, name)
        size = min(trial.method.bank_size, highest)
        references.append(FixedTrial(name, trial.with_values({"method.bank_size": size})))
    said = (*checked.notes(), *ignored_variables(config.tracking), *notes)
    return checked, space, tuple(references), said


def _check_final_fit(config: StudyConfig, num_train: int) -> None:
    """Check the workers of the final fit; its other settings are those of some trial."""
    if config.final_fit.images == "none":
        return
    trial = with_final_workers(config.trial, config.final_fit)
    on_gpus = config.resources.worker_gpus(trial.training.max_workers) > 0
    if problems := check_trial(trial, num_train, on_gpus=on_gpus):
        raise ConfigError([f"final_fit.workers: {problem}" for problem in problems])


def study_trainings(config: StudyConfig) -> dict[str, TrainingConfig]:
    """Return the trainings that must fit on the cluster, by the setting of their workers."""
    trainings = {WORKERS: config.trial.training}
    if config.final_fit.images != "none":
        again = with_final_workers(config.trial, config.final_fit)
        trainings["final_fit.workers"] = again.training
    return trainings


def space_content(config: StudyConfig) -> dict[str, Any]:
    """Return the search space as a mapping, read from its file where the study names one."""
    return read_space(config.space) if isinstance(config.space, str) else config.space
