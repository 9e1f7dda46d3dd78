"""Build a table of fully trained configurations, for benchmarks that replay searches.

    .venv/bin/python benchmarks/curves.py --images 100          # curves-100.parquet: the grid
    .venv/bin/python benchmarks/curves.py --images 400          # curves-400.parquet: K = 100 only
    .venv/bin/python benchmarks/curves.py --schedules           # schedules.parquet

scikit-learn's digits (100 or 400 images to train, 425 or 350 to validate) at 32 px, batches of 20,
EfficientNet-Lite0 with the demo's weights, 18 or 9 epochs with a cosine schedule, one seed. With
`--schedules`: a part of the grid, on 100 images, under four schedules. A row is a configuration:
its place in the grid, `schedule`, `outcome`, and `val_accuracy`, a list over its epochs (shorter if
it diverged). An interrupted run resumes. Two schedules are not in the package:

    restarts  cosine from 1 to 0 within each rung of ASHA's defaults (epochs 1-2, 3-6, 7-18)
    linear    constant over the first two thirds, then linearly down to 0
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from drtune_ray.config.training import OptimConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.table_store import TableStore
from drtune_ray.demo import demo_config
from drtune_ray.study.inputs import check_inputs
from drtune_ray.study.tables import prepare
from drtune_ray.training import trial as trial_module
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.reports import EpochReport
from drtune_ray.training.schedules import build_schedule

HERE = Path(__file__).parent
PROCESSES = 2
EPOCHS = {100: 18, 400: 9}  # by images to train
RUNGS = (0, 2, 6, EPOCHS[100])
GRID: dict[str, tuple[float, ...]] = {
    "optim.backbone_lr": (0.0003, 0.0006, 0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04),
    "method.regularization_weight": (0.05, 0.25, 1.0, 4.0),
    "method.head_lr_multiplier": (0.5, 2.5, 10.0),
    "method.bank_size": (32, 100),
}
BASE = {
    "data.image_size": 32,
    "data.views": 2,
    "data.validation_fraction": 0.1,
    "data.test_fraction": 0.3,
    "training.batch_size": 20,
}
SCHEDULES = ("cosine", "constant", "restarts", "linear")
NUM_OF_SCHEDULES = 24  # configurations, drawn from the grid
Job = tuple[str, dict[str, float]]


def factor(schedule: str, epoch: float) -> float:
    """Factor of the learning rates, for the schedules that only this benchmark tries."""
    if schedule == "linear":
        return min(1.0, 3.0 * (1.0 - epoch / RUNGS[-1]))
    start = max(rung for rung in RUNGS[:-1] if rung <= epoch)
    end = RUNGS[RUNGS.index(start) + 1]
    return 0.5 * (1.0 + math.cos(math.pi * (epoch - start) / (end - start)))


def schedule_of(
    name: str, optimizer: Optimizer, config: OptimConfig, num_epochs: int, steps_per_epoch: int
) -> LambdaLR:
    """Build a schedule by its name, like `build_schedule`."""
    if name in ("cosine", "constant"):
        config = config.model_copy(update={"schedule": name})
        return build_schedule(optimizer, config, num_epochs, steps_per_epoch)
    return LambdaLR(
        optimizer, lambda step: factor(name, min(step / steps_per_epoch, RUNGS[-1] - 1e-9))
    )


def train(job: Job, base: TrialConfig, tables: Tables) -> dict[str, Any]:
    """Return a row of the table."""
    schedule, point = job
    config = base.with_values(point)
    backbone = read_backbone(tables.backbone)
    data = TrainingData(tables, config.data, backbone.normalization.interpolation)
    with mock.patch.object(trial_module, "build_schedule", partial(schedule_of, schedule)):
        reports = [
            event
            for event in train_epochs(config, data, backbone, num_threads=1)
            if isinstance(event, EpochReport)
        ]
    curve = [record.metrics["val_accuracy"] for record in reports[-1].history]
    return point | {"schedule": schedule, "outcome": reports[-1].outcome, "val_accuracy": curve}


def jobs(images: int, with_schedules: bool) -> list[Job]:
    """Return the configurations, in an order in which any first part is a sample of all."""
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    if images > 100:
        points = [point for point in points if point["method.bank_size"] == 100]
    random.Random(0).shuffle(points)
    if with_schedules:
        return [(name, p) for p in points[:NUM_OF_SCHEDULES] for name in SCHEDULES]
    return [("cosine", point) for point in points]


def key(schedule: str, point: dict[str, Any]) -> str:
    return json.dumps([schedule, *(point[name] for name in GRID)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=100, choices=list(EPOCHS))
    parser.add_argument(
        "--schedules", action="store_true", help="a part of the grid, under four schedules"
    )
    options = parser.parse_args()
    wanted = jobs(options.images, options.schedules)
    name = "schedules" if options.schedules else f"curves-{options.images}"
    target = HERE / f"{name}.parquet"
    lines = target.with_suffix(".jsonl")
    done = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    known = {key(row["schedule"], row) for row in done}
    left = [job for job in wanted if key(*job) not in known]
    with tempfile.TemporaryDirectory(prefix="curves-") as folder:
        base = demo_config(Path(folder)).trial.with_values(
            BASE
            | {
                "training.epochs": EPOCHS[options.images],
                "data.train_per_class": options.images // 10,
            }
        )
        with TableStore(Path(folder), 4.0) as store:
            tables = prepare(check_inputs(base, Path(folder)), base, store, "cpu")
        work = partial(train, base=base, tables=tables)
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool, lines.open("a") as file:
            for row in pool.imap_unordered(work, left):
                done.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{len(done)} of {len(wanted)}", end="\r", flush=True)
    order = {key(*job): at for at, job in enumerate(wanted)}
    done.sort(key=lambda row: order[key(row["schedule"], row)])
    pq.write_table(pa.Table.from_pylist(done), target)
    lines.unlink()
    print(f"\n{target}: {len(done)} configurations")


if __name__ == "__main__":
    main()
