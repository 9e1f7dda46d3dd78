"""Is DR more than a faster head? At CE-tuning's searched rates, on the validation images alone.

    .venv/bin/python benchmarks/why.py SET FOLDER   # after benchmarks/evidence.py run SET FOLDER

DR (eq. 5) has a gradient for the head alone, so a head that learns faster might do as well. Every
variant has the learning rates and the weight decay that the comparison found for CE-tuning, so that
no search stands between them, and the same seeds, views and order of images:

- ``CE``: CE-tuning as it was found; ``CE, head x N``: N times the learning rate for the head.
- ``DR``: distribution regularization of weight 1, without calibration; ``DR-Tune``: the defaults.
- ``frozen``: the pretrained encoder keeps its weights.

Shown are the accuracy after a few epochs and after the last one (of the weights as they are, no
maximum over epochs), paired differences to CE with their standard errors over the seeds, and the
median over epochs and seeds of DR's share in the head's gradient.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from accuracy import CALIBRATION, PROCESSES, one_thread, paired, prepare_tables
from evidence import CHOOSING, CONFIRMING, read_set, study_values
from report import describe_machine

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.method.diagnostics import DR_GRADIENT_SHARE
from drtune_ray.training.backbones import read_backbone
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.reports import EpochReport
from drtune_ray.values import flattened, nested

HEAD = "method.head_lr_multiplier"
NO_CALIBRATION = {CALIBRATION + "rotation": False, CALIBRATION + "translation": False}
FROZEN = {"backbone.frozen_layers": "all"}
DR_TUNE, CE = {"method.name": "dr_tune"}, {"method.name": "ce_tuning"}
Curve = list[dict[str, float]]  # metrics by epoch


def variants(multiplier: float) -> dict[str, dict[str, Any]]:
    """Return what each variant changes; `multiplier` is CE-tuning's for the head."""
    return {
        "CE": CE,
        "CE, head x 2": CE | {HEAD: 2 * multiplier},
        "CE, head x 4": CE | {HEAD: 4 * multiplier},
        "DR": DR_TUNE | NO_CALIBRATION,
        "DR-Tune": DR_TUNE,
        "frozen, CE": CE | FROZEN,
        "frozen, DR-Tune": DR_TUNE | FROZEN,
    }


def base_values(name: str, folder: Path) -> dict[str, Any]:
    """Return the trial of the set with what its comparison found for CE-tuning."""
    options = argparse.Namespace(trials=1, configurations=1, seeds=1)
    trial = flattened(study_values(name, folder / name, options)["trial"])
    result = read_set(name, folder)
    if result is None:
        raise SystemExit(f"{name} is not done: benchmarks/evidence.py run {name} {folder}")
    return trial | result.methods["ce_tuning"].settings


def curve(config: TrialConfig, tables: Tables) -> Curve:
    """Return the metrics of all epochs."""
    backbone = read_backbone(tables.backbone)
    data = TrainingData(tables, config.data, backbone.normalization.interpolation)
    history: Curve = []
    for report in train_epochs(config, data, backbone, num_threads=1):
        if isinstance(report, EpochReport):
            history = [dict(record.metrics) for record in report.history]
    return history


def measure(name: str, folder: Path, num_seeds: int) -> dict[str, list[Curve]]:
    """Train all variants on all seeds; return their curves in the order of the seeds."""
    values = base_values(name, folder)
    changes = variants(float(values[HEAD]))
    configs = {
        (variant, seed): TrialConfig.from_mapping(
            nested(values | change | {"seed": seed, "data.view_seed": seed})
        )
        for seed in range(101, 101 + num_seeds)
        for variant, change in changes.items()
    }
    print(", ".join(f"{path} {value:.4g}" for path, value in values.items() if "lr" in path))
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES, one_thread) as pool:
        by_data = {config.tables_key: config for config in configs.values()}
        storage = folder / name / "why"
        found = pool.map(partial(prepare_tables, storage=storage), by_data.values(), 1)
        tables = dict(zip(by_data, found, strict=True))
        jobs = [(each, tables[each.tables_key]) for each in configs.values()]
        curves = dict(zip(configs, pool.starmap(curve, jobs, 1), strict=True))
    return {
        variant: [of for (other, _), of in curves.items() if other == variant]
        for variant in changes
    }


def print_table(curves: dict[str, list[Curve]]) -> None:
    """Print a row a variant, as Markdown."""
    num_epochs = len(curves["CE"][0])
    shown = sorted({max(1, num_epochs // 4), num_epochs // 2, num_epochs})
    headers = [f"epoch {epoch}, minus CE" for epoch in shown]
    print(f"| variant | {' | '.join(headers)} | DR in the head's gradient |")
    print("|" + "---|" * (len(headers) + 2))
    for variant, of_seeds in curves.items():
        cells = []
        for epoch in shown:
            values, others = (
                [100 * of[epoch - 1]["val_accuracy"] for of in each]
                for each in (of_seeds, curves["CE"])
            )
            gap = "" if variant == "CE" else f", {paired(values, others).strip()}"
            cells.append(f"{statistics.fmean(values):.1f}{gap}")
        shares = [
            row[DR_GRADIENT_SHARE] for of in of_seeds for row in of if DR_GRADIENT_SHARE in row
        ]
        share = f"{100 * statistics.median(shares):.0f} %" if shares else "-"
        print(f"| {variant} | {' | '.join(cells)} | {share} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=(*CHOOSING, *CONFIRMING))
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds")
    options = parser.parse_args()
    print(describe_machine(f"benchmarks/why.py {options.set} {options.folder}"))
    print_table(measure(options.set, Path(options.folder).resolve(), options.seeds))


if __name__ == "__main__":
    main()
