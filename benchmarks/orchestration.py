"""Measure what Ray costs a trial: resident actors, plain processes, nested Ray Train workers.

    .venv/bin/python benchmarks/orchestration.py

The same fixed trials of the demo's work run to their last epoch, with a checkpoint an epoch, in
three ways, one after another:

    plain     two processes that each train half of them in a loop over `train_epochs`
    resident  as a study runs them: `TrialActor` with ``reuse_actors``, two at a time
    nested    the first few of them, each as a TorchTrainer (`drive_trial`), as trials of several
              workers run

Ray's start is printed separately. The start of the processes that train is part of the wall time,
for the plain ones and the actors alike. The overhead of a trial is what its slot did beside its
epochs, between the end of the first trial and the end of the last but one, when both slots are
busy:

    overhead a trial = (2 * seconds between - seconds in epochs) / trials that ended between

It contains building the model, filling the bank and writing checkpoints, in all three ways. The
cost of Ray is the overhead minus that of the plain processes. If the epochs of two ways differ
much, the machine was busy with something else: run it again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch
from ray import tune

from drtune_ray.config.study import StudyConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.table_store import TableStore
from drtune_ray.demo import demo_config
from drtune_ray.execution.capacity import Capacity, Cluster
from drtune_ray.execution.ray_train.trainer import drive_trial
from drtune_ray.execution.ray_tune import run
from drtune_ray.execution.ray_tune.run import TuneRun, tune_trainable
from drtune_ray.execution.ray_tune.searcher import StudySearch
from drtune_ray.execution.run_context import RunContext
from drtune_ray.execution.session import ray_session
from drtune_ray.execution.worker_context import WorkerContext
from drtune_ray.search.outcomes import Outcomes
from drtune_ray.search.proposals import FinalistProposals, FixedTrial
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.optuna_storage import open_storage, open_study
from drtune_ray.storage.record import TRIALS_FOLDER
from drtune_ray.study.inputs import check_inputs
from drtune_ray.study.tables import prepare
from drtune_ray.tracking.events import Event, MetricsRecorded, RunFinished
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.checkpoint import trial_folder
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.reports import EpochReport
from drtune_ray.values import deep_merge

AT_A_TIME, EPOCHS, IMAGE_SIZE = 2, 5, 48
NUM_TRIALS = {"plain": 24, "resident": 24, "nested": 4}
OVER_DEMO = {"trial": {"data": {"image_size": IMAGE_SIZE}, "training": {"epochs": EPOCHS}}}


@dataclass
class Record:
    """The times at which trials ended, and the durations of their epochs."""

    started: float = field(default_factory=time.time)
    ends: list[float] = field(default_factory=list)
    epoch_seconds: dict[int, float] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def take(self, event: Event) -> None:
        if isinstance(event, MetricsRecorded) and event.number is not None:
            seconds = self.epoch_seconds.get(event.number, 0.0) + event.metrics["seconds"]
            self.epoch_seconds[event.number] = seconds
        elif isinstance(event, RunFinished) and event.number is not None:
            self.ended(event.number)

    def ended(self, number: int) -> None:
        self.ends.append(time.time())
        self.order.append(number)

    @property
    def wall(self) -> float:
        return max(self.ends) - self.started

    @property
    def work(self) -> float:
        """Mean seconds that a trial spends in epochs."""
        return sum(self.epoch_seconds.values()) / len(self.epoch_seconds)

    @property
    def overhead(self) -> float:
        ends, inner = sorted(self.ends), self.order[1:-1]
        seconds = ends[-2] - ends[0]
        work = sum(self.epoch_seconds[number] for number in inner)
        return (AT_A_TIME * seconds - work) / len(inner)


def fixed_trials(config: StudyConfig, number: int) -> list[FixedTrial]:
    """Return DR-Tune and CE-tuning configurations in turn, each with its own seed."""
    methods = ("dr_tune", "ce_tuning")
    values = ({"seed": n, "method.name": methods[n % 2]} for n in range(number))
    return [FixedTrial(f"{n}", config.trial.with_values(v)) for n, v in enumerate(values)]


def run_plain(config: StudyConfig, tables: Tables, folder: Path) -> Record:
    """Run the trials in two processes, half of them each."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    trials = list(enumerate(fixed_trials(config, NUM_TRIALS["plain"])))
    processes = [
        context.Process(target=_loop, args=(trials[slot::AT_A_TIME], tables, folder, queue))
        for slot in range(AT_A_TIME)
    ]
    record = Record()
    for process in processes:
        process.start()
    for _ in trials:
        number, seconds = queue.get()
        record.epoch_seconds[number] = seconds
        record.ended(number)
    for process in processes:
        process.join()
    return record


def _loop(trials: list[tuple[int, FixedTrial]], tables: Tables, folder: Path, queue: Any) -> None:
    torch.set_num_threads(1)
    backbone, opened = read_backbone(tables.backbone), None
    for number, trial in trials:
        if opened is None:
            interpolation = backbone.normalization.interpolation
            opened = TrainingData(tables, trial.config.data, interpolation)
        into, seconds = trial_folder(folder, number), 0.0
        for event in train_epochs(trial.config, opened, backbone, num_threads=1):
            event.save(into)
            if isinstance(event, EpochReport) and event.record is not None:
                seconds += event.record.metrics["seconds"]
        into.drop_resumable()
        queue.put((number, seconds))


def run_tune(
    config: StudyConfig, tables: Tables, folder: Path, way: str, capacity: Capacity
) -> Record:
    """Run the trials through Tune, as a study does."""
    folder.mkdir()
    study = open_study(open_storage(folder, None), way)
    trials = tuple(fixed_trials(config, NUM_TRIALS[way]))
    record = Record()
    kind, trainable = (TuneRun, tune_trainable) if way == "resident" else (_Nested, _nested)
    context = RunContext(
        folder / way,
        f"{way}-{os.getpid()}",
        config.resources,
        StudyArtifacts(None, folder / way),
        Cluster(capacity, None, print),
        record.take,
        disk_error=lambda: None,
        on_interrupt=lambda: None,
    )
    tune_run = kind(config.model_copy(update={"storage": str(folder), "name": way}), context)
    with mock.patch.object(run, "tune_trainable", trainable):
        record.started = time.time()
        tune_run.run(
            StudySearch(FinalistProposals(study, trials), Outcomes(study)),
            {config.trial.tables_key: tables},
        )
    return record


class _Nested(TuneRun):
    def _watch(self) -> None:
        """Workers of Ray Train have a guard of their own, and no actor is reused."""


def _nested(config: StudyConfig, context: WorkerContext, capacity: Capacity) -> Any:
    """Return the trainable that `tune_trainable` makes for several workers, here for one."""
    bound = tune.with_parameters(
        drive_trial, context=context, resources=config.resources, num_workers=1
    )
    return tune.with_resources(bound, capacity.driver_resources())


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(
        "command: .venv/bin/python benchmarks/orchestration.py\n"
        f"machine: {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, Ray {ray.__version__}\n"
        f"work: trials of {EPOCHS} epochs at {IMAGE_SIZE} px, {AT_A_TIME} at a time; all in seconds"
    )
    records: dict[str, Record] = {}
    with tempfile.TemporaryDirectory(prefix="orchestration-") as name:
        storage = Path(name)
        config = StudyConfig.from_mapping(deep_merge(demo_config(storage).to_mapping(), OVER_DEMO))
        with TableStore(storage, config.trial.data.cache_limit_gib) as store:
            checked = check_inputs(config.trial, storage)
            tables = prepare(checked, config.trial, store, "cpu")
        records["plain"] = run_plain(config, tables, storage / TRIALS_FOLDER)
        for way in ("resident", "nested"):
            started = time.time()
            with ray_session(with_dashboard=way == "nested") as capacity:  # as a study has it
                print(f"Ray's start, {way}: {time.time() - started:.1f}")
                records[way] = run_tune(config, tables, storage / way, way, capacity)
    print(f"{'':10}trials  wall in all  epochs a trial  overhead a trial")
    for way, record in records.items():
        figures = f"{record.wall:13.1f}{record.work:16.2f}{record.overhead:18.2f}"
        print(f"{way:10}{NUM_TRIALS[way]:6}{figures}")
    resident, plain, nested = (records[way] for way in ("resident", "plain", "nested"))
    ours, theirs = (record.overhead - plain.overhead for record in (resident, nested))
    print(
        f"Ray's part of the overhead of a trial: resident {ours:.2f}, nested {theirs:.2f}; "
        f"resident / nested {ours / theirs:.4f}\n"
        f"wall, resident / plain: {resident.wall / plain.wall:.3f}"
    )


if __name__ == "__main__":
    main()
