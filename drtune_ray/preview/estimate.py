"""preview_study: what a study will cost, from seconds of its work on this machine.

Nothing is written under the storage, and Ray is not started. Some of the images are prepared in a
temporary folder of the system's (`TMPDIR`), and the base configuration and the reference trials
train on them in processes of their own; how many epochs there will be is simulated.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drtune_ray.config.study import StudyConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.splits import VALIDATION
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.capacity import Capacity, Demand, Node, trial_demand, trials_that_fit
from drtune_ray.preview.measure import Measured, Measurement, Workload, measured
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

MAX_PROCESSES = 8  # measured side by side: more of them on one machine say little more
# What is not measured here, as seen on two cores: the first two on the demo and on other images
# (wall time of the command, less the study's own; first trials against later ones), the last two
# by benchmarks/orchestration.py.
RAY_SECONDS = 12.0  # imports, Ray's start and end, MLflow's store, the winner
ACTOR_SECONDS = 2.0  # Ray's part of starting the actors, beside what a process of ours takes
TRIAL_SECONDS = 0.3  # of a trial in a resident actor, besides its training
NESTED_TRIAL_SECONDS = 18.0  # of a trial of several workers: Ray Train starts them for each


@dataclass(frozen=True)
class Preview:
    """What a study will cost, counted from its beginning.

    Attributes:
        config: The study.
        trials_at_a_time: How many trials run side by side.
        studies: The simulated ones.
        measurement: What was measured, of the base and of each reference trial that differs.
        paces: Seconds of those trials.
        steps_per_epoch: Of the base.
        fixed_seconds: Start and end, whatever the trials do, without preparing.
        prepare_seconds: Of the tables that are not there yet.
        final_fit_seconds: Of training the winner once more, at most; 0 where that is not asked for.
        tables: All that the study reads.
        machine: This one.
        memory_bytes: That this machine could give now.
        local_trials: How many trials its CPUs and GPUs hold at a time.
        notes: Sentences about it.
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
        """Of an attribute of `Simulated` over the studies."""
        return spread([getattr(study, name) for study in self.studies])

    @property
    def seconds(self) -> Spread:
        """Of the whole study."""
        trials = self.spread("seconds")
        fixed = self.fixed_seconds + self.prepare_seconds + self.final_fit_seconds
        return Spread(trials.mean + fixed, trials.low + fixed, trials.high + fixed)

    @property
    def checkpoint_bytes(self) -> float:
        """Most that the trials' folders hold at once, when the last of the trials run."""
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
        """Of all tables."""
        return sum(table.num_bytes for table in self.tables)

    @property
    def new_table_bytes(self) -> int:
        """Of those that are not there yet."""
        return sum(table.num_bytes for table in self.tables if not table.exists)

    @property
    def workers_in_memory(self) -> int:
        """How many workers the memory of this machine holds at a time."""
        return int(self.memory_bytes // max(1.0, self.measurement.peak_bytes))

    @property
    def _num_trained(self) -> float:
        return self.spread("num_trials").mean + self.spread("final_trials").mean


def preview_study(config: StudyConfig) -> Preview:
    """Check a study as `run_study` does, and say what it will cost.

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
    capacity = Capacity((Node(machine.num_cpus, machine.num_gpus),), is_local=_is_local())
    at_a_time, place_notes = _trials_at_a_time(config, demand, capacity)
    device, device_notes = preparing_device(config.resources, capacity)
    tables = _tables(config, checked, _configs(config, base, space, references), device)
    check_seconds = time.monotonic() - started
    kinds = _kinds(base, references)
    on_this_machine = max(1, min(at_a_time, capacity.trials_now(demand)))
    with tempfile.TemporaryDirectory(prefix="drtune-preview-") as folder:
        with_pixels = any(table.kind == VIEWS for table in tables) or not base.data.views
        sample = prepared_sample(checked, kinds, Path(folder), device, with_pixels=with_pixels)
        measurement = _measure(config, kinds, sample, device, on_this_machine)
    paces = [_pace(kind, checked, sample, m) for kind, m in _zip(kinds, measurement)]
    prepare_seconds = sample.seconds(tables)
    # Actors are started for the search and, where there are finalists, once more.
    num_starts = 2 if config.finalists.num_seeds else 1
    start_seconds = measurement.start_seconds + ACTOR_SECONDS
    fixed_seconds = check_seconds + RAY_SECONDS + num_starts * start_seconds
    of_trials = _paces_of_trials(config, kinds, paces, references)
    studies = simulated_studies(config, of_trials, at_a_time, prepare_seconds + start_seconds)
    return Preview(
        config,
        at_a_time,
        studies,
        measurement,
        tuple(paces),
        _num_steps(base, checked, sample),
        fixed_seconds,
        prepare_seconds,
        _final_fit_seconds(config, checked, sample, measurement.trials[0]),
        tables,
        machine,
        _free_memory(),
        capacity.trials_now(demand),
        (*notes, *place_notes, *device_notes, *_notes(config, tables)),
    )


def _is_local() -> bool:
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def _storage(config: StudyConfig) -> Path:
    return full_path(config.storage)


def _trials_at_a_time(
    config: StudyConfig, demand: Demand, capacity: Capacity
) -> tuple[int, tuple[str, ...]]:
    """As the study would decide it; of a cluster only what was asked for is known."""
    if capacity.is_local:
        return trials_that_fit(demand, config.resources, capacity), ()
    asked = config.resources.trials_at_a_time
    note = (
        f"the cluster of RAY_ADDRESS={os.environ['RAY_ADDRESS']} is not asked: measured on this "
        "machine, and counted with "
    )
    if asked is not None:
        return asked, (note + "resources.trials_at_a_time",)
    return max(1, capacity.trials_now(demand)), (note + "as many trials as fit here",)


def _configs(
    config: StudyConfig, base: TrialConfig, space: SearchSpace, references: Sequence[FixedTrial]
) -> list[TrialConfig]:
    """A trial of each kind of tables, in the order in which the study prepares them.

    Each seed of the finalists sees views of its own; they are taken to be of the base's kind.
    """
    seeds = range(1, config.finalists.num_seeds + 1)
    finals = [base.with_values({"data.view_seed": base.data.view_seed + seed}) for seed in seeds]
    return [*table_variants(space, base), *(r.config for r in references), *finals]


def _tables(
    config: StudyConfig, checked: StudyInputs, configs: Sequence[TrialConfig], device: str
) -> tuple[PlannedTable, ...]:
    """What the trials read, and the final fit, where one is asked for."""
    tables = planned_tables(checked, configs, _storage(config), device)
    if config.final_fit.images == "none":
        return tables
    everything = without_validation(checked)
    return (*tables, *planned_tables(everything, configs[:1], _storage(config), device))


def _kinds(base: TrialConfig, references: Sequence[FixedTrial]) -> list[TrialConfig]:
    """The base and the reference trials, each configuration once."""
    kinds = [base]
    for reference in references:
        if reference.config not in kinds:
            kinds.append(reference.config)
    return kinds


def _measure(
    config: StudyConfig,
    kinds: Sequence[TrialConfig],
    sample: Sample,
    device: str,
    at_a_time: int,
) -> Measurement:
    """Train the kinds on the sample; of several workers, each process is one without the others."""
    workers = config.trial.training.max_workers
    trials = []
    for kind in kinds:
        values = {
            "data.views": sample.config.data.views,
            "training.workers": 1,
            "training.batch_size": -(-kind.training.batch_size // workers),
        }
        trials.append(kind.with_values(values).to_mapping())
    threads = config.resources.cpus_per_worker
    workload = Workload(sample.tables.to_mapping(), trials, threads, device)
    return measured(workload, min(MAX_PROCESSES, at_a_time * workers))


def _zip(
    kinds: Sequence[TrialConfig], measurement: Measurement
) -> list[tuple[TrialConfig, Measured]]:
    return list(zip(kinds, measurement.trials, strict=True))


def _num_steps(kind: TrialConfig, checked: StudyInputs, sample: Sample) -> float:
    """Steps of an epoch, in steps of the kind that the sample has."""
    num_train, size = checked.num_train, kind.training.batch_size
    if sample.num_train < num_train and not kind.training.drop_last:
        return num_train / size  # all steps of the sample are whole ones
    return num_train // size if kind.training.drop_last else -(-num_train // size)


def _pace(kind: TrialConfig, checked: StudyInputs, sample: Sample, found: Measured) -> Pace:
    """Seconds of a trial over all images."""
    workers = kind.training.max_workers
    share = checked.splits.count(VALIDATION) / sample.num_validation / workers
    steps = _num_steps(kind, checked, sample) * found.step_seconds
    validation = share * found.validation_seconds
    overhead = TRIAL_SECONDS if workers == 1 else NESTED_TRIAL_SECONDS
    return Pace(found.begin_seconds + overhead, steps + validation + found.save_seconds)


def _final_fit_seconds(
    config: StudyConfig, checked: StudyInputs, sample: Sample, found: Measured
) -> float:
    """Of the base on all images but those of the test, to its last epoch."""
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
    """Of each trial of the search, in the order in which they begin."""
    given = [paces[0]] * len(config.start_with)
    given += [paces[kinds.index(reference.config)] for reference in references]
    return given + [paces[0]] * (config.trials - len(given))


def _free_memory() -> int:
    """Bytes that processes could take now without swapping.

    Raises:
        EnvironmentProblem: Where the system does not say it.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
        return 1024 * int(sizes["MemAvailable"].split()[0])
    except (OSError, KeyError) as error:
        raise EnvironmentProblem(f"/proc/meminfo does not say the free memory: {error}") from None


def _notes(config: StudyConfig, tables: Sequence[PlannedTable]) -> tuple[str, ...]:
    """What the figures leave out."""
    notes = []
    if config.folder.exists():
        notes.append(f"{config.folder} exists: counted as if it began anew")
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
