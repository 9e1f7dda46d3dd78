"""Measure how well rotations fitted to the bank align other rows, in real training.

    .venv/bin/python benchmarks/alignment.py                  # digits, 60 images a class
    .venv/bin/python benchmarks/alignment.py --data FOLDER --image-size 64

The default DR-Tune is trained once. Meanwhile each candidate keeps an R of its own, refreshed at
every tenth step from the same bank. At every step, before the batch is enqueued, its rows are
measured with features of unit length, v^p and v^d:

- ``global``: mean cosine of R (v^p - mean) and v^d - mean, with the means of the bank;
- ``class``: the same with the deviations from the bank's means of the row's class. This is what R
  is for while the class-level translation is on, which sets the class centres itself;
- ``error``: sum of |R x - y|^2 over sum of |y|^2 for those deviations x, y. Below 1 R is better
  than moving each row to the centre of its class, above 1 worse: here length counts too.

Only rows whose image was not in the bank at the last refresh count; the bank's size and the order
of the epochs determine how many there are. For comparison, ``fitted`` is `class` on the bank itself
right after a refresh. "Early" is the first epoch, "late" the last quarter of the epochs, "middle"
all epochs between them. Milliseconds are medians: of a refresh from the bank (a warm start where
there is one), and of applying R to its rows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accuracy import add_common_options, common_values, prepare_tables
from report import describe_machine
from torch import Tensor
from torch.nn import functional as F

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import Tables, TrainingData
from drtune_ray.method import FeatureBank
from drtune_ray.method.class_rows import ClassRows
from drtune_ray.method.rotation import (
    COLD_ITERATIONS,
    WARM_ITERATIONS,
    Rotation,
    centred,
    exact_rotation,
    random_start,
    subspace_rotation,
    warm_start,
)
from drtune_ray.training.backbones import Backbone, read_backbone
from drtune_ray.training.trial import Trial
from drtune_ray.values import nested

RANKS, SHRINKAGES = (16, 32, 64, 128), (0.02, 0.1, 0.3)
PHASES = ("early", "middle", "late", "mean")
MEASURES = ("global", "class", "error")


# ---- candidates


class Candidate:
    """A way to find R, and the last R that it found."""

    def __init__(self, name: str, solve: Callable[[Tensor, Tensor, Rotation | None], Rotation]):
        self.name, self.solve = name, solve
        self.rotation: Rotation | None = None
        self.refresh_ms: list[float] = []
        self.apply_ms: list[float] = []

    def refresh(self, pretrained: Tensor, downstream: Tensor) -> None:
        """Solve R from the bank's rows of unit length, (K, D) each, without changing them."""
        started = time.perf_counter()
        self.rotation = self.solve(centred(pretrained), centred(downstream), self.rotation)
        self.refresh_ms.append(1e3 * (time.perf_counter() - started))
        rows = pretrained.clone()
        started = time.perf_counter()
        self.rotation.apply_(rows)
        self.apply_ms.append(1e3 * (time.perf_counter() - started))

    def rotated(self, rows: Tensor) -> Tensor:
        assert self.rotation is not None
        return self.rotation.apply_(rows.clone())


def no_rotation(source: Tensor, target: Tensor, former: Rotation | None) -> Rotation:
    nothing = source.new_zeros(source.shape[1], 1)
    return Rotation(nothing, nothing, source.new_ones(()))


def exact(source: Tensor, target: Tensor, former: Rotation | None) -> Rotation:
    return exact_rotation(source, target)


def randomized(rank: int, shrinkage: float) -> Callable[..., Rotation]:
    """Call `subspace_rotation` as `SemanticCalibration` does."""

    def solve(source: Tensor, target: Tensor, former: Rotation | None) -> Rotation:
        start = random_start(source.shape[1], rank)
        num_iterations = COLD_ITERATIONS
        if former is not None:
            start, num_iterations = warm_start(former, start), WARM_ITERATIONS
        return subspace_rotation(
            source, target, start, shrinkage=shrinkage, num_iterations=num_iterations
        )

    return solve


def candidates(config: TrialConfig) -> list[Candidate]:
    shipped = config.method.calibration
    settings = [(rank, shrinkage) for rank in RANKS for shrinkage in SHRINKAGES]
    default = (shipped.rotation_rank, shipped.rotation_shrinkage)
    settings = [default, *(own for own in settings if own != default)]
    return [
        Candidate("none", no_rotation),
        Candidate("svd", exact),
        *(Candidate(f"r{rank}-t{shrink:g}", randomized(rank, shrink)) for rank, shrink in settings),
    ]


# ---- watching a training


class WatchedData(TrainingData):
    """Training data that remembers the images of the last batch."""

    last_rows: Sequence[int] = ()

    def pretrained_features(self, rows: Sequence[int], view: int) -> Tensor | None:
        """Return the batches of the data."""
        self.last_rows = list(rows)
        return super().pretrained_features(rows, view)


class WatchedBank(FeatureBank):
    """A bank that shows each batch to the candidates before it enters."""

    def __init__(self, like: FeatureBank, data: WatchedData, config: TrialConfig) -> None:
        super().__init__(like.bank_size, like.pretrained.shape[1])
        self.data, self.candidates = data, candidates(config)
        self.interval = config.method.calibration.rotation_interval
        self.images: list[int] = []  # in the bank, oldest first
        self.images_at_refresh: set[int] = set()
        self.step: int | None = None  # None while the bank is warmed up
        self.found: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        self.fitted: dict[str, list[float]] = defaultdict(list)
        self.num_rows: list[tuple[int, int]] = []

    @torch.no_grad()
    def enqueue(self, pretrained: Tensor, downstream: Tensor, labels: Tensor) -> None:
        """Measure the batch, then enqueue it."""
        if self.step is not None:
            if self.step % self.interval == 0:
                self._refresh()
            self._measure(pretrained, downstream, labels)
            self.step += 1
        super().enqueue(pretrained, downstream, labels)
        self.images = [*self.images, *self.data.last_rows][-self.bank_size :]

    def _refresh(self) -> None:
        own, others, labels = self.unit_rows()
        self.images_at_refresh = set(self.images)
        classes = ClassRows(labels, len(self.data.classes))
        source, target = deviations(own, classes, labels), deviations(others, classes, labels)
        for candidate in self.candidates:
            candidate.refresh(own, others)
            cosines = F.cosine_similarity(candidate.rotated(source), target)
            self.fitted[candidate.name].append(float(cosines.mean()))

    def _measure(self, pretrained: Tensor, downstream: Tensor, labels: Tensor) -> None:
        assert self.step is not None
        images = self.data.last_rows
        bank_pretrained, bank_downstream, bank_labels = self.unit_rows()
        classes = ClassRows(bank_labels, len(self.data.classes))
        is_new = torch.tensor([image not in self.images_at_refresh for image in images])
        is_new &= classes.counts[labels] > 0
        self.num_rows.append((self.step, int(is_new.sum())))
        labels = labels[is_new]
        own, others = F.normalize(pretrained[is_new]), F.normalize(downstream[is_new])
        source = own - classes.means(bank_pretrained)[labels]
        target = others - classes.means(bank_downstream)[labels]
        own, others = own - bank_pretrained.mean(0), others - bank_downstream.mean(0)
        for candidate in self.candidates:
            moved = candidate.rotated(source)
            rows = [
                F.cosine_similarity(candidate.rotated(own), others),
                F.cosine_similarity(moved, target),
                (moved - target).square().sum(1),
                target.square().sum(1),
            ]
            self.found[candidate.name].append((self.step, torch.stack(rows)))

    def unit_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        pretrained, downstream, labels = self.stored()
        return F.normalize(pretrained), F.normalize(downstream), labels


def deviations(rows: Tensor, classes: ClassRows, labels: Tensor) -> Tensor:
    return rows - classes.means(rows)[labels]


# ---- measuring


def trial_config(folder: Path, options: argparse.Namespace, seed: int) -> TrialConfig:
    own = {
        "seed": seed,
        "data.view_seed": seed,
        "optim.backbone_lr": options.lr,
        "method.bank_size": options.bank_size,
    }
    return TrialConfig.from_mapping(nested(common_values(folder, options) | own))


def watched_training(
    config: TrialConfig, tables: Tables, backbone: Backbone
) -> tuple[Trial, WatchedBank]:
    """Train to the end and return the trial with its watched bank."""
    data = WatchedData(tables, config.data, backbone.normalization.interpolation)
    trial = Trial(config, data, backbone, torch.device("cpu"))
    bank = WatchedBank(trial.method.bank, data, config)
    trial.method.bank = bank
    trial.warm_up_bank()
    bank.step = 0
    while trial.progress.outcome is None:
        assert all(trial.steps())
        trial.finish_epoch()
    return trial, bank


def phase_of(step: int, steps_per_epoch: int, num_epochs: int) -> str:
    epoch = step // steps_per_epoch + 1
    if epoch == 1:
        return "early"
    return "late" if epoch > num_epochs - max(1, num_epochs // 4) else "middle"


def by_phase(found: list[tuple[int, Tensor]], phases: Sequence[str]) -> dict[str, list[float]]:
    """Return the values of `MEASURES` for each phase; NaN where no row counted."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for (_, values), phase in zip(found, phases, strict=True):
        parts[phase].append(values)
        parts["mean"].append(values)
    result = {phase: [math.nan] * len(MEASURES) for phase in PHASES}
    for phase, tensors in parts.items():
        rows = torch.cat(tensors, 1)
        if rows.shape[1]:
            error = float(rows[2].sum() / rows[3].sum())
            result[phase] = [float(rows[0].mean()), float(rows[1].mean()), error]
    return result


def print_table(trial: Trial, bank: WatchedBank, config: TrialConfig) -> None:
    phases = [
        phase_of(step, trial.steps_per_epoch, config.training.epochs) for step, _ in bank.num_rows
    ]
    counts: dict[str, int] = defaultdict(int)
    for phase, (_, count) in zip(phases, bank.num_rows, strict=True):
        counts[phase] += count
    counted = ", ".join(f"{phase} {counts[phase]}" for phase in PHASES[:3])
    print(
        f"\nseed {config.seed}: {len(trial.data.train)} images, {len(trial.data.classes)} classes, "
        f"bank of {len(bank)}, {trial.steps_per_epoch} steps an epoch, validation accuracy "
        f"{100 * (trial.progress.best_value or 0.0):.1f}; rows counted: {counted}"
    )
    groups = "".join(f"{measure:>17}{'':11}" for measure in MEASURES)
    print(f"{'':10}{groups}  fitted    milliseconds")
    print(f"{'':10}" + "  early middle   late   mean" * 3 + "   class  refresh  apply")
    for candidate in bank.candidates:
        found = by_phase(bank.found[candidate.name], phases)
        cells = [f"{found[phase][m]:6.2f}" for m in range(len(MEASURES)) for phase in PHASES]
        print(
            f"{candidate.name:11}"
            + " ".join(cells)
            + f"{statistics.fmean(bank.fitted[candidate.name]):8.2f}"
            + f"{statistics.median(candidate.refresh_ms):9.1f}"
            + f"{statistics.median(candidate.apply_ms):7.1f}",
            flush=True,
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_common_options(parser, train_per_class=60)
    parser.add_argument("--bank-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    print(describe_machine("benchmarks/alignment.py"))
    print("options: " + " ".join(f"{name}={value}" for name, value in vars(options).items()))
    with tempfile.TemporaryDirectory(prefix="drtune-alignment-") as folder:
        for seed in range(options.seeds):
            config = trial_config(Path(folder), options, seed)
            tables = prepare_tables(config, Path(folder))
            trial, bank = watched_training(config, tables, read_backbone(tables.backbone))
            print_table(trial, bank, config)


if __name__ == "__main__":
    main()
