"""What Ray costs a trial: resident actors beside nested Ray Train workers, over the same real work.

    .venv/bin/python benchmarks/orchestration.py

Shows, in about three minutes on two cores, why trials of one worker run in resident actors
(`TrialActor` with ``reuse_actors``) and only those of several workers as a TorchTrainer each
(`drive_trial`). Both ways run in turn, each on a Ray of its own with the dashboard, which nested
workers need. The work is the demo's; the nested trials are the first ones of the resident run.

    overhead a trial = (wall clock of Tuner.fit() * trials at a time - seconds in epochs) / trials

It holds all that is not an epoch: Tune, processes and imports, and, for both ways alike, building
a trial's model, warming up its bank and writing its checkpoints. The resident actors start once:
here that is spread over a few trials, in a study over many. Where the epochs of the two ways
differ much, the machine was busy with something else: run it again.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray import tune

from drtune_ray.config import StudyConfig
from drtune_ray.data.store import TableStore
from drtune_ray.demo import demo_config
from drtune_ray.search.actor import Workplace
from drtune_ray.search.identity import SCRATCH_NAME, TRIALS_FOLDER
from drtune_ray.search.prepare import check_inputs, prepare
from drtune_ray.search.protocol import result_history
from drtune_ray.search.searcher import StudySearch, build_sampler
from drtune_ray.search.session import Capacity, ray_session, trials_that_fit
from drtune_ray.search.space import SearchSpace
from drtune_ray.search.study import open_optuna_study
from drtune_ray.search.trainables import tune_trainable
from drtune_ray.search.workers import drive_trial
from drtune_ray.values import deep_merge

AT_A_TIME, EPOCHS, IMAGE_SIZE = 2, 2, 32
NUM_TRIALS = {"resident": 8, "nested": 4}
OVER_DEMO = {
    "sampler": {"name": "random"},  # proposes the same whatever the trials before came to
    "trial": {"data": {"image_size": IMAGE_SIZE}, "training": {"epochs": EPOCHS}},
}


class Inputs(NamedTuple):
    """What both ways share, prepared once."""

    storage: Path
    config: StudyConfig
    space: SearchSpace
    tables: dict[str, Any]


def prepare_inputs(storage: Path) -> Inputs:
    config = StudyConfig.from_mapping(deep_merge(demo_config(storage).to_mapping(), OVER_DEMO))
    checked = check_inputs(config.trial, storage)
    space = SearchSpace.from_mapping(config.to_mapping()["space"], config.trial)
    with TableStore(storage, config.trial.data.cache_limit_gib) as store:
        tables = prepare(checked, config.trial, store, "cpu").to_mapping()
    return Inputs(storage, config, space.clamped(checked.num_train)[0], tables)


def measure(way: str, inputs: Inputs) -> tuple[float, float]:
    """Seconds of wall clock, and seconds in epochs, of all trials of one way."""
    with ray_session(with_dashboard=True) as capacity:
        if trials_that_fit(1, inputs.config.resources, capacity) < AT_A_TIME:
            raise SystemExit(f"{AT_A_TIME} trials run at a time: that needs {AT_A_TIME} cores")
        tuner = build_tuner(way, inputs, capacity)
        started = time.monotonic()
        grid = tuner.fit()
        return time.monotonic() - started, epoch_seconds(grid, NUM_TRIALS[way])


def build_tuner(way: str, inputs: Inputs, capacity: Capacity) -> tune.Tuner:
    config, folder = inputs.config, inputs.storage / way
    folder.mkdir()
    study, threads = open_optuna_study(folder, way), config.resources.cpus_per_worker
    sampler_for = partial(build_sampler, config.sampler, config.seed)
    search = StudySearch(study, inputs.space, config.trial, (), NUM_TRIALS[way], sampler_for)
    workplace = Workplace(inputs.tables, folder / TRIALS_FOLDER, threads, "cpu")
    resident = way == "resident"
    trainable = (tune_trainable if resident else nested_trainable)(config, workplace, capacity)
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            max_concurrent_trials=AT_A_TIME,
            num_samples=-1,
            search_alg=search,
            reuse_actors=resident,
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder / SCRATCH_NAME),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


def nested_trainable(config: StudyConfig, workplace: Workplace, capacity: Capacity) -> Any:
    """As `tune_trainable` makes it for trials of several workers; here for one."""
    bound = tune.with_parameters(drive_trial, workplace=workplace, resources=config.resources)
    return tune.with_resources(bound, capacity.driver_resources())


def epoch_seconds(grid: tune.ResultGrid, num_trials: int) -> float:
    histories = [result_history(result.metrics or {}) for result in grid]
    if grid.num_errors or [len(history) for history in histories] != [EPOCHS] * num_trials:
        raise RuntimeError(f"not {num_trials} whole trials of {EPOCHS} epochs: {histories}")
    return sum(record.metrics["seconds"] for history in histories for record in history)


def main() -> None:
    print(
        "command: .venv/bin/python benchmarks/orchestration.py\n"
        f"machine: {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, Ray {ray.__version__}\n"
        f"work: trials of {EPOCHS} epochs at {IMAGE_SIZE} px, {AT_A_TIME} at a time; all in seconds"
    )
    rows: dict[str, tuple[float, ...]] = {}
    with tempfile.TemporaryDirectory(prefix="orchestration-") as storage:
        inputs = prepare_inputs(Path(storage))
        for way, num in NUM_TRIALS.items():
            wall, work = measure(way, inputs)
            rows[way] = (wall / num, work / num, (wall * AT_A_TIME - work) / num)
    print(f"{'':10}trials  wall a trial  epochs a trial  overhead a trial")
    for way, row in rows.items():
        print(f"{way:10}{NUM_TRIALS[way]:6}{row[0]:14.2f}{row[1]:16.2f}{row[2]:18.2f}")
    ratios = [nested / resident for resident, nested in zip(*rows.values(), strict=True)]
    print(f"nested / resident{ratios[0]:13.2f}{ratios[1]:16.2f}{ratios[2]:18.2f}")


if __name__ == "__main__":
    main()
