"""Compare the validation accuracy of DR-Tune's variants with CE-tuning, paired over seeds.

    .venv/bin/python benchmarks/accuracy.py --lr 0.001 0.003       # digits, ten images a class
    .venv/bin/python benchmarks/accuracy.py --views 0 1 2 4 8 16   # the default, by data.views
    .venv/bin/python benchmarks/accuracy.py --data FOLDER --image-size 64 --train-per-class 8

A seed determines the views, the order of the images and the head's initial weights, and is the same
for all variants; the splits are the same for all seeds. So differences are paired, and standard
errors cover the randomness of training on this one split, not other images. The accuracy is that of
the best epoch on the validation split: a maximum over epochs. With several learning rates each
variant is shown at each rate, and at the rate with its best mean over the seeds: a maximum over
rates too, so slightly too high for every variant. The pretrained weights are those of the demo
extra.

Variants: ``ce``; ``dr`` (no calibration); ``no-rotation``; ``svd`` (exact, refreshed every tenth
step and kept); ``default``; ``authors`` (the preset); ``rRANK-tSHRINKAGE``, like r64-t0.02; and
``ce-head-xN`` and ``default-head-xN`` with N times the learning rate for the head. A training that
diverged counts with its best epoch before that, and is marked with a star.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import describe_machine

from drtune_ray.config.demo_weights import DEMO_BACKBONE
from drtune_ray.config.study import reference_config
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.data.table_store import TableStore
from drtune_ray.demo import write_digits
from drtune_ray.study.inputs import check_inputs
from drtune_ray.study.tables import prepare
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.reports import COMPLETED, EpochReport
from drtune_ray.values import nested

CALIBRATION = "method.calibration."
VARIANTS: dict[str, dict[str, Any]] = {
    "ce": {"method.name": "ce_tuning"},
    "dr": {CALIBRATION + "rotation": False, CALIBRATION + "translation": False},
    "no-rotation": {CALIBRATION + "rotation": False},
    "svd": {CALIBRATION + "rotation_solver": "svd"},
    "default": {},
    "authors": {},
}
RANKED = re.compile(r"r(\d+)-t([\d.]+)")
HEADED = re.compile(r"(ce|default)-head-x([\d.]+)")
PROCESSES = 2


class Run(NamedTuple):
    """One training: its name in the tables, and its configuration."""

    seed: int
    rate: float
    column: str
    config: TrialConfig


Accuracies = dict[tuple[str, float], list[float]]  # (column, rate): in the order of the seeds


# ---- configurations


def common_values(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of all runs, for the digits (written to `folder`) or for --data."""
    own: dict[str, Any] = {"data.train": options.data}
    if options.data is None:
        own = {
            "data.train": str(write_digits(folder / "digits")),
            "data.horizontal_flip": 0.0,  # a mirrored digit is another sign
            "data.crop_fraction": 1.0,
        }
    return own | {
        "data.train_per_class": options.train_per_class or None,
        "data.test_fraction": options.test_fraction,
        "data.image_size": options.image_size,
        "data.crop_scale_min": 0.6,
        "backbone.name": DEMO_BACKBONE,
        "backbone.weights": "demo",
        "training.epochs": options.epochs,
        "training.batch_size": options.batch_size,
    }


def variant_config(base: TrialConfig, variant: str) -> TrialConfig:
    """Return the configuration of a variant.

    Raises:
        ValueError: Naming the known variants.
    """
    if variant == "authors":
        return reference_config(base, variant)
    if variant in VARIANTS:
        return base.with_values(VARIANTS[variant])
    if headed := HEADED.fullmatch(variant):
        multiplier = {"method.head_lr_multiplier": float(headed[2])}
        return base.with_values(VARIANTS[headed[1]] | multiplier)
    ranked = RANKED.fullmatch(variant)
    if ranked is None:
        known = [*VARIANTS, "r64-t0.02 (rank and shrinkage)", "ce-head-x4"]
        raise ValueError(f"variant must be one of {known}, but got {variant!r}")
    return base.with_values(
        {
            CALIBRATION + "rotation_rank": int(ranked[1]),
            CALIBRATION + "rotation_shrinkage": float(ranked[2]),
        }
    )


def planned_runs(values: Mapping[str, Any], options: argparse.Namespace) -> list[Run]:
    """Return the runs seed by seed, so that the finished ones can be compared."""
    runs = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for rate in options.lr:
            own = {"seed": seed, "data.view_seed": seed, "optim.backbone_lr": rate}
            base = TrialConfig.from_mapping(nested({**values, **own}))
            if options.views is None:
                configs = {name: variant_config(base, name) for name in options.variants}
            else:
                configs = {f"{n} views": base.with_values({"data.views": n}) for n in options.views}
            runs += [Run(seed, rate, column, config) for column, config in configs.items()]
    return runs


# ---- running


def one_thread() -> None:
    torch.set_num_threads(1)


def prepare_tables(config: TrialConfig, storage: Path) -> Tables:
    with TableStore(storage, config.data.cache_limit_gib) as store:
        return prepare(check_inputs(config, storage), config, store, "cpu")


def best_accuracy(config: TrialConfig, tables: Tables) -> tuple[float, str | None]:
    """Return the accuracy of the best epoch, in percent, and how the training ended."""
    backbone = read_backbone(tables.backbone)
    data = TrainingData(tables, config.data, backbone.normalization.interpolation)
    best, outcome = 0.0, None
    for report in train_epochs(config, data, backbone, num_threads=1):
        if isinstance(report, EpochReport):
            outcome = report.outcome
            best = max((record.metrics["val_accuracy"] for record in report.history), default=0.0)
    return 100.0 * best, outcome


def measure(runs: Sequence[Run], storage: Path) -> Accuracies:
    """Train all, and print the accuracies of each seed and rate as soon as they are known."""
    accuracies: Accuracies = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES, one_thread) as pool:
        configs = {run.config.data: run.config for run in runs}
        prepared = pool.map(partial(prepare_tables, storage=storage), configs.values(), 1)
        tables = dict(zip(configs, prepared, strict=True))
        jobs = [
            pool.apply_async(best_accuracy, (run.config, tables[run.config.data])) for run in runs
        ]
        for run, job in zip(runs, jobs, strict=True):
            found = accuracies.setdefault((run.column, run.rate), [])
            is_first = run.column == runs[0].column
            print(f"\n{run.seed:4} {run.rate:7g}" if is_first else "", end="")
            accuracy, outcome = job.get()
            found.append(accuracy)
            mark = " " if outcome == COMPLETED else "*"
            print(f"{accuracy:12.2f}{mark}", end="", flush=True)
    print()
    return accuracies


# ---- tables


def best_rate(accuracies: Accuracies, column: str) -> float:
    """Return the rate with the best mean over the seeds."""
    rates = [rate for name, rate in accuracies if name == column]
    return max(rates, key=lambda rate: statistics.fmean(accuracies[column, rate]))


def paired(values: Sequence[float], others: Sequence[float]) -> str:
    """Return the mean difference and its standard error."""
    gaps = [a - b for a, b in zip(values, others, strict=True)]
    if len(gaps) < 2:
        return f"{gaps[0]:+7.2f}          "
    return f"{statistics.fmean(gaps):+7.2f} +- {statistics.stdev(gaps) / len(gaps) ** 0.5:5.2f} "


def print_table(
    title: str, accuracies: Accuracies, rates: Mapping[str, float], references: Sequence[str]
) -> None:
    """Print a row for each variant, at the rate given for it."""
    print(f"\n{title}\n{'':12}    rate    mean      sd", end="")
    print("".join(f"{f'minus {name}':>19}" for name in references))
    for column, rate in rates.items():
        values = accuracies[column, rate]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        gaps = [paired(values, accuracies[name, rates[name]]) for name in references]
        print(
            f"{column:12}{rate:8g}{statistics.fmean(values):8.2f}{spread:8.2f}"
            + "".join(f"{gap:>19}" for gap in gaps)
        )


def print_tables(accuracies: Accuracies, options: argparse.Namespace) -> None:
    columns = list(dict.fromkeys(column for column, _ in accuracies))
    wanted = ("ce", "svd", "default") if options.views is None else ("0 views", "8 views")
    references = [name for name in wanted if name in columns]
    for rate in options.lr:
        title = f"all at rate {rate:g}"
        print_table(title, accuracies, dict.fromkeys(columns, rate), references)
    if len(options.lr) > 1:
        rates = {column: best_rate(accuracies, column) for column in columns}
        print_table("each at its best rate (a maximum)", accuracies, rates, references)


def add_common_options(parser: argparse.ArgumentParser, train_per_class: int) -> None:
    parser.add_argument("--data", help="class folders (default: scikit-learn's digits)")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument(
        "--train-per-class",
        type=int,
        default=train_per_class,
        help="0: all that the fractions leave",
    )
    parser.add_argument(
        "--test-fraction", type=float, default=0.2, help="sealed; 0.2 are for validation"
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_common_options(parser, train_per_class=10)
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.001])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME")
    parser.add_argument(
        "--views", type=int, nargs="+", help="compare these data.views instead of variants"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    given = " ".join(f"{name}={value}" for name, value in vars(options).items())
    print(describe_machine("benchmarks/accuracy.py"))
    print(f"options: {given}; {PROCESSES} processes of one thread")
    with tempfile.TemporaryDirectory(prefix="drtune-accuracy-") as folder:
        runs = planned_runs(common_values(Path(folder), options), options)
        columns = list(dict.fromkeys(run.column for run in runs))
        print("best-epoch validation accuracy, %\nseed    rate", end="")
        print("".join(f"{column:>13}" for column in columns), end="", flush=True)
        print_tables(measure(runs, Path(folder)), options)


if __name__ == "__main__":
    main()
