"""Estimate what a study will cost from seconds of its work on this machine.

Nothing is written under the storage, and Ray is not started. Some of the images are prepared in a
temporary folder of the system's (`TMPDIR`), this process trains the base configuration and the
reference trials on them, and the number of epochs is simulated.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drtune_ray.config.study import StudyConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.splits import VALIDATION
from drtune_ray.execution.capacity import Capacity, Demand, Node, trial_demand, trials_that_fit
from drtune_ray.execution.environment import LOCAL, ray_address
from drtune_ray.preview.measure import Measured, Measurement, free_memory, measured
from drtune_ray.preview.sample import VIEWS, PlannedTable, Sample, planned_tables, prepared_sample
from drtune_ray.preview.simulate import Pace, Simulated, Spread, simulated_studies, spread
from drtune_ray.search.proposals import FixedTrial
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.study.checks import check_study
from drtune_ray.study.final_fit import with_final_workers, without_validation
from drtune_ray.study.inputs import StudyInputs
from drtune_ray.study.machine import Machine, this_machine
from drtune_ray.study.tables import preparing_device, table_variants
from drtune_ray.values import full_path

# Costs that are not measured here, as seen on two cores. The first two: wall time of the command
# on the demo and on other images less the study's own time, first trials against later ones. The
# last two: benchmarks/orchestration.py.
RAY_SECONDS = 12.0  # imports, Ray's start and end, MLflow's store, the winner
ACTOR_SECONDS = 9.0  # start of the actors, their imports included
TRIAL_SECONDS = 0.3  # overhead of a trial in a resident actor
NESTED_TRIAL_SECONDS = 18.0  # overhead of a trial of several workers, which Ray Train starts anew
# Step of a worker beside another one over a step alone, on two cores without messages: 1.07 and
# 1.10 by benchmarks/scaling.py.
SIDE_BY_SIDE = 1.1


@dataclass(frozen=True)
class Preview:
    """What a study will cost, counted from its beginning.

    Attributes:
        config: The study.
        trials_at_a_time: How many trials run side by side.
        studies: The simulated studies.
        measurement: Figures of the base configuration and of each reference trial that differs.
        paces: Seconds of those trials.
        steps_per_epoch: Steps of an epoch of the base configuration.
        fixed_seconds: Start and end, whatever the trials do, without preparing.
        prepare_seconds: Time to prepare the tables that are not there yet.
        final_fit_seconds: Time to train the winner once more, at most; 0 without a final fit.
        tables: All tables that the study reads.
        machine: This machine.
        memory_bytes: Memory that this machine could give now.
        local_trials: How many trials its CPUs and GPUs hold at a time.
        notes: Sentences about the estimate.
    """

    config: StudyConfig
    trials_at_a_time: int
    studies: tuple[Simulated, ...]
    measurement: Measurement
    paces: tuple[Pace, ...]
    steps_per_epoch: float
    fixed_seconds: float
    prepare_seconds: float
    final_fit_seconds: float
    tables: tuple[PlannedTable, ...]
    machine: Machine
    memory_bytes: int
    local_trials: int
    notes: tuple[str, ...]

    def spread(self, name: str) -> Spread:
        """Return the spread of an attribute of `Simulated` over the studies."""
        return spread([getattr(study, name) for study in self.studies])

    @property
    def seconds(self) -> Spread:
        """Time of the whole study."""
        trials = self.spread("seconds")
        fixed = self.fixed_seconds + self.prepare_seconds + self.final_fit_seconds
        return Spread(trials.mean + fixed, trials.low + fixed, trials.high + fixed)

    @property
    def checkpoint_bytes(self) -> float:
        """Most that the trials' folders hold at once, when the last trials run."""
        base, num_trials = self.measurement.trials[0], self._num_trained
        num_running = min(num_trials, self.trials_at_a_time)
        return num_trials * base.best_bytes + num_running * 2 * base.checkpoint_bytes

    @property
    def kept_bytes(self) -> float:
        """What stays when the study is done: best weights, the winner, and MLflow's copies."""
        num_copies = self.config.tracking.num_top_checkpoints + 2  # the winner, in both places
        return (self._num_trained + num_copies) * self.measurement.trials[0].best_bytes

    @property
    def table_bytes(self) -> int:
        """Size of all tables."""
        return sum(table.num_bytes for table in self.tables)

    @property
    def new_table_bytes(self) -> int:
        """Size of the tables that are not there yet."""
        return sum(table.num_bytes for table in self.tables if not table.exists)

    @property
    def workers_in_memory(self) -> int:
        """How many workers the memory of this machine holds at a time."""
        return int(self.memory_bytes // max(1.0, self.measurement.peak_bytes))

    @property
    def _num_trained(self) -> float:
        return self.spread("num_trials").mean + self.spread("final_trials").mean


def preview_study(config: StudyConfig) -> Preview:
    """Check a study as `run_study` does, and estimate what it will cost.

    Raises:
        ConfigError: For bad input.
        EnvironmentProblem: If this machine cannot run a trial.
    """
    started = time.monotonic()
    checked, space, references, notes = check_study(config)
    base = config.trial.with_values(
        {"method.bank_size": min(config.trial.method.bank_size, checked.num_train)}
    )
    machine, demand = this_machine(), trial_demand(base.training, config.resources)
    is_local = ray_address() == LOCAL
    capacity = Capacity((Node(machine.num_cpus, machine.num_gpus),), is_local=is_local)
    at_a_time, place_notes = _trials_at_a_time(config, demand, capacity)
    device, device_notes = preparing_device(config.resources, capacity)
    tables = _tables(config, checked, _table_trials(config, base, space, references), device)
    check_seconds = time.monotonic() - started
    kinds = list(dict.fromkeys((base, *(reference.config for reference in references))))
    slowdown = _slowdown(demand, min(at_a_time, capacity.trials_now(demand)))
    with tempfile.TemporaryDirectory(prefix="drtune-preview-") as folder:
        with_pixels = any(table.kind == VIEWS for table in tables) or not base.data.views
        sample = prepared_sample(checked, kinds, Path(folder), device, with_pixels=with_pixels)
        workers = [_worker(kind, sample) for kind in kinds]
        num_threads = config.resources.cpus_per_worker
        measurement = measured(workers, sample.tables, num_threads, device, slowdown)
    paces = tuple(
        _pace(kind, checked, sample, found)
        for kind, found in zip(kinds, measurement.trials, strict=True)
    )
    prepare_seconds = sample.seconds(tables)
    # Actors are started for the search and, where there are finalists, once more.
    num_starts = 2 if config.finalists.num_seeds else 1
    by_trial = _paces_of_trials(config, kinds, paces, references)
    return Preview(
        config,
        at_a_time,
        simulated_studies(config, by_trial, at_a_time, prepare_seconds + ACTOR_SECONDS),
        measurement,
        paces,
        _num_steps(base, checked, sample),
        check_seconds + RAY_SECONDS + num_starts * ACTOR_SECONDS,
        prepare_seconds,
        _final_fit_seconds(config, checked, sample, measurement.trials[0]),
        tables,
        machine,
        free_memory(),
        capacity.trials_now(demand),
        (*notes, *place_notes, *device_notes, *_notes(config, tables)),
    )


def _trials_at_a_time(
    config: StudyConfig, demand: Demand, capacity: Capacity
) -> tuple[int, tuple[str, ...]]:
    """Decide it as the study would; a cluster is not reached, only its settings are known."""
    if capacity.is_local:
        return trials_that_fit(demand, config.resources, capacity), ()
    requested = config.resources.trials_at_a_time
    source = "as many trials as fit here" if requested is None else "resources.trials_at_a_time"
    note = (
        f"the cluster of RAY_ADDRESS={ray_address()} is not reached: measured on this "
        f"machine, and counted with {source}"
    )
    return requested or max(1, capacity.trials_now(demand)), (note,)


def _table_trials(
    config: StudyConfig, base: TrialConfig, space: SearchSpace, references: Sequence[FixedTrial]
) -> list[TrialConfig]:
    """Return a trial of each kind of tables, in the order in which the study prepares them.

    Each seed of the finalists has views of its own; they are taken to be of the base's kind.
    """
    seeds = range(1, config.finalists.num_seeds + 1)
    finals = [base.with_values({"data.view_seed": base.data.view_seed + seed}) for seed in seeds]
    return [*table_variants(space, base), *(r.config for r in references), *finals]


def _tables(
    config: StudyConfig, checked: StudyInputs, trials: Sequence[TrialConfig], device: str
) -> tuple[PlannedTable, ...]:
    """Plan what the trials read, and the final fit, where there is one."""
    storage = full_path(config.storage)
    tables = planned_tables(checked, trials, storage, device)
    if config.final_fit.images == "none":
        return tables
    return (*tables, *planned_tables(without_validation(checked), trials[:1], storage, device))


def _slowdown(demand: Demand, num_trials: int) -> float:
    """Return the time of a worker beside the others on this machine, over its time alone."""
    num_workers = num_trials * demand.num_workers
    if 0 < demand.num_gpus < 1:  # workers of a shared device take turns, at worst
        return float(max(1, min(num_workers, int(1 / demand.num_gpus))))
    return SIDE_BY_SIDE if num_workers > 1 else 1.0


def _worker(kind: TrialConfig, sample: Sample) -> TrialConfig:
    """Return one worker's part of a trial, to be trained on the sample."""
    values = {
        "data.views": sample.config.data.views,
        "training.workers": 1,
        "training.batch_size": -(-kind.training.batch_size // kind.training.max_workers),
    }
    return kind.with_values(values)


def _num_steps(kind: TrialConfig, checked: StudyInputs, sample: Sample) -> float:
    """Return the steps of an epoch, counted in steps as the sample has them."""
    num_train, size = checked.num_train, kind.training.batch_size
    if sample.num_train < num_train and not kind.training.drop_last:
        return num_train / size  # all steps of the sample are whole ones
    return num_train // size if kind.training.drop_last else -(-num_train // size)


def _pace(kind: TrialConfig, checked: StudyInputs, sample: Sample, found: Measured) -> Pace:
    """Return the seconds of a trial over all images."""
    workers = kind.training.max_workers
    share = checked.splits.count(VALIDATION) / sample.num_validation / workers
    steps = _num_steps(kind, checked, sample) * found.step_seconds
    validation = share * found.validation_seconds
    overhead = TRIAL_SECONDS if workers == 1 else NESTED_TRIAL_SECONDS
    return Pace(found.begin_seconds + overhead, steps + validation + found.save_seconds)


def _final_fit_seconds(
    config: StudyConfig, checked: StudyInputs, sample: Sample, found: Measured
) -> float:
    """Return the time of training the base, to its last epoch, on all images but the test's."""
    if config.final_fit.images == "none":
        return 0.0
    trial, again = config.trial, with_final_workers(config.trial, config.final_fit)
    speed = again.training.max_workers / trial.training.max_workers
    num_steps = _num_steps(trial, without_validation(checked), sample)
    epoch_seconds = num_steps * found.step_seconds / speed + found.save_seconds
    begin_seconds = NESTED_TRIAL_SECONDS + found.begin_seconds
    return begin_seconds + trial.training.last_epoch * epoch_seconds


def _paces_of_trials(
    config: StudyConfig,
    kinds: Sequence[TrialConfig],
    paces: Sequence[Pace],
    references: Sequence[FixedTrial],
) -> list[Pace]:
    """Return the pace of each trial of the search, in the order in which they begin."""
    given = [paces[0]] * len(config.start_with)
    given += [paces[kinds.index(reference.config)] for reference in references]
    return given + [paces[0]] * (config.trials - len(given))


def _notes(config: StudyConfig, tables: Sequence[PlannedTable]) -> tuple[str, ...]:
    """Return sentences about what the figures leave out."""
    notes = []
    if config.folder.exists():
        notes.append(f"{config.folder} exists: counted as if the study started anew")
    limits = {
        "budget.target_accuracy": config.budget.target_accuracy,
        "budget.patience_trials": config.budget.patience_trials,
        "training.patience_epochs": config.trial.training.patience_epochs,
    }
    unseen = [name for name, value in limits.items() if value is not None]
    if unseen:
        notes.append(f"{' and '.join(unseen)} may end it earlier: they depend on the accuracies")
    if config.trial.training.max_workers > 1:
        notes.append("what the workers of a trial send each other is not measured")
    if config.trial.data.views and not any(table.kind == VIEWS for table in tables):
        limit = config.trial.data.cache_limit_gib
        notes.append(
            f"the pixels of the views do not fit under data.cache_limit_gib={limit:g}: each epoch "
            "decodes and augments again"
        )
    return tuple(notes)
