"""State of one trial: modules, optimiser and progress, which checkpoints hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from torch import Tensor, nn

from drtune_ray.config.metric import METRICS
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import TrainingData
from drtune_ray.method import MethodOutput, MixedBatch
from drtune_ray.method.collective import MicroBatch
from drtune_ray.training.accumulation import StepTotals, micro_batches, synchronisation
from drtune_ray.training.backbones import Backbone
from drtune_ray.training.batches import Inputs, TrainingBatches
from drtune_ray.training.class_balance import loss_weights
from drtune_ray.training.compilation import compile_encoders
from drtune_ray.training.distributed import ProcessGroup, data_parallel, is_distributed
from drtune_ray.training.frozen_features import Normalizer
from drtune_ray.training.methods import method_scale, trial_dtype
from drtune_ray.training.mixing import mixing, own_rows, part_of
from drtune_ray.training.model import (
    build_method,
    derived_seed,
    set_training_mode,
)
from drtune_ray.training.optim import build_optimizer
from drtune_ray.training.reports import (
    COMPLETED,
    DIVERGED,
    PATIENCE,
    EpochRecord,
    EpochReport,
)
from drtune_ray.training.saving import CheckpointWriter, Progress, load_state
from drtune_ray.training.schedules import build_schedule
from drtune_ray.training.step_signals import StepSignals
from drtune_ray.training.update import Updater
from drtune_ray.training.validation import ValidationTotals
from drtune_ray.training.weight_average import WeightAverage

EVALUATION_ROWS = 64


class Trial:
    """One trial in this process; of several processes each has its own.

    Args:
        config: Configuration of the trial.
        data: Training and validation images.
        backbone: Pretrained encoder.
        device: Device to train on.
        on_progress: Function called before every batch.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: TrainingData,
        backbone: Backbone,
        device: torch.device,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self._on_progress = on_progress
        self.normalization = backbone.normalization
        self.dtype = trial_dtype(config)
        self.normalizer = Normalizer(backbone.normalization, device, self.dtype)
        self.group = ProcessGroup()
        self.batches = TrainingBatches(config, data, self.normalizer, self.group, device)
        # Dropout and the like draw from torch's global generator: one seed for each rank.
        torch.manual_seed(derived_seed(config.seed, "training", self.group.rank) % 2**32)
        num_classes, labels = len(data.classes), data.train.labels
        method = build_method(
            config,
            backbone,
            num_classes,
            len(labels),
            not data.has_features,
            loss_weights(config, labels, num_classes),
        )
        self.mixing = mixing(config, num_classes)
        if config.training.batch_norm == "synchronised" and is_distributed():
            # timm's function keeps the activation within a BatchNormAct2d; torch's drops it.
            convert = convert_sync_batchnorm
            method.downstream_encoder = convert(method.downstream_encoder)  # type: ignore[no-untyped-call]
        method = method.to(device=device, dtype=self.dtype)
        self.method = method.to(memory_format=torch.channels_last)
        self.module = data_parallel(self.method, device)
        encoder, head = self.method.downstream_encoder, self.method.head
        multiplier = method_scale(config, len(data.train)).head_lr_multiplier
        self.optimizer = build_optimizer(encoder, head, config.optim, multiplier)
        self.steps_per_epoch = len(self.batches.rows(0))
        self.schedule = build_schedule(
            self.optimizer, config.optim, config.training.epochs, self.steps_per_epoch
        )
        self.amp_dtype = _amp_dtype(config.training.precision, device)
        scaler = torch.amp.GradScaler(
            device.type, enabled=self.amp_dtype == torch.float16 and device.type == "cuda"
        )
        decay = config.training.ema_decay
        self.average = None if decay is None else WeightAverage(encoder, head, decay)
        self.updater = Updater(
            method, self.optimizer, self.schedule, scaler, config.optim.clip_norm, self.average
        )
        if config.training.compile:
            compile_encoders(self.method, device)
        self.progress = Progress()
        self.signals = StepSignals(self.group)
        self.pending: list[Tensor] = []
        method.enqueues = not scaler.is_enabled()  # otherwise a step may be skipped
        self.is_best = False
        self.answers: Tensor | None = None
        self.has_trained = False
        self.writer = CheckpointWriter(self)

    def warm_up_bank(self) -> None:
        """Give the method the first images of a pass over the training data, if it wants any."""
        if self.method.num_warm_up_rows == 0:
            return
        order = self.batches.rows(-1, drop_last=False)
        rows = [row for batch in order for row in batch][: self.method.num_warm_up_rows]
        size = self.config.training.batch_size
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        for batch in self._inputs(batches, epoch=-1):
            with self._autocast():
                self.method.warm_up(*batch)

    def steps(self, wants_save: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Train the rest of the present epoch; yield after each step whether all was finite so far.

        On an accelerator the answer is `LAG` steps late: by then the weights may be broken.

        Args:
            wants_save: Function called at each step; see `StepSignals.take_save`.
        """
        progress = self.progress
        if progress.steps_done == 0:
            self.method.begin_epoch()
        set_training_mode(self.method, self.config.training.batch_norm)
        batches = self.batches.rows(progress.epochs_done)[progress.steps_done :]
        training, step = self.config.training, StepTotals()
        parts, places = micro_batches(batches, training.batch_size, training.accumulation_steps)
        for place, inputs in zip(places, self._inputs(parts, progress.epochs_done), strict=True):
            with synchronisation(self.module, place):
                step.add(*self._forward(inputs, place))
                if not place.is_last:
                    self.updater.backward(step.loss)
                    continue
            self.signals.add(step.is_finite, wants_save())
            if self.signals.has_diverged():
                yield False
                return
            self._update(step.loss)
            self.pending.append(step.take())
            progress.steps_done += 1
            yield True

    def _forward(self, inputs: Inputs, place: MicroBatch) -> tuple[MethodOutput, Tensor]:
        """Return what the method gives for a part of a batch, and the number of correct rows."""
        images, labels, features, shares = inputs
        images, labels, mixed = self._mixed(images, labels, shares)
        with self._autocast():
            output = self.module(images, labels, features, shares, place, mixed)
        wanted = labels if mixed is None else mixed.targets.argmax(1)
        own = wanted[: shares[self.group.rank]]
        return output, (output.logits.argmax(1) == own).sum()

    def _mixed(
        self, images: Tensor, labels: Tensor, shares: Sequence[int]
    ) -> tuple[Tensor, Tensor, MixedBatch | None]:
        """Return this process's own images and labels, and the same mixed if they are to be."""
        if self.mixing is None:
            return images, labels, None
        part = part_of(sum(shares), *own_rows(shares, self.group.rank))
        at = (self.progress.epochs_done, self.progress.steps_done)
        mixed = self.mixing(images, labels, part, *at)
        return images[: part.num_own], labels[: part.num_own], mixed

    def finish_epoch(self) -> None:
        """Validate, record the epoch and decide whether the trial has ended."""
        started = time.monotonic()
        progress = self.progress
        if self.signals.has_diverged(wait=True):
            progress.outcome = DIVERGED
            return
        self.collect_steps()
        validation = self._validate() if len(self.data.validation) else {}
        if not self._is_sound(validation):
            # The last update broke the weights: the epoch is not a result and cannot be the best.
            progress.outcome = DIVERGED
            return
        means = self._step_means()
        progress.epochs_done += 1
        progress.steps_done = 0
        metrics = self._judged(validation) | means
        metrics |= {name: float(value) for name, value in self.method.diagnostics().items()}
        metrics["best_epoch"] = float(progress.best_epoch)
        metrics["seconds"] = progress.epoch_seconds + time.monotonic() - started
        progress.add_epoch(metrics, self._named_steps())
        patience = self.config.training.patience_epochs
        if progress.epochs_done >= self.config.training.last_epoch:
            progress.outcome = COMPLETED
        elif patience and progress.epochs_done - progress.best_epoch >= patience:
            progress.outcome = PATIENCE

    def _is_sound(self, validation: Mapping[str, float]) -> bool:
        """Whether the weights are finite: by the validation loss, without one by the weights."""
        if validation:
            return math.isfinite(validation["val_loss"])
        tensors = self.method.downstream_encoder.state_dict() | self.method.head.state_dict()
        return all(bool(t.isfinite().all()) for t in tensors.values())

    def _judged(self, validation: dict[str, float]) -> dict[str, float]:
        """Update the best epoch; return the metrics of the epoch's validation."""
        progress = self.progress
        if not validation:  # without validation images the last epoch counts
            progress.best_epoch, self.is_best = progress.epochs_done, True
            return {}
        metric, best = METRICS[self.config.training.metric], progress.best_value
        value = validation[metric.measure]
        if best is None or metric.score(value) > metric.score(best):
            progress.best_value = best = value
            progress.best_epoch, self.is_best = progress.epochs_done, True
        # The objective comes first: MLflow's comparisons open on the metric logged first.
        return {metric.best: best} | validation

    def report(self) -> EpochReport:
        """Return the present state as a report."""
        history = tuple(EpochRecord(**record) for record in self.progress.history)
        last, outcome = history[-1] if history else None, self.progress.outcome
        save = self.writer.save_later if outcome is None else self.writer.save
        return EpochReport(
            last, history, self.progress.best_value, outcome, save, self.writer.settle
        )

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint."""
        load_state(self, state)

    def _inputs(self, batches: Sequence[Sequence[int]], epoch: int) -> Iterator[Inputs]:
        are_mixed = self.mixing is not None and epoch >= 0
        for inputs in self.batches.inputs(batches, epoch, are_mixed=are_mixed):
            self._on_progress()
            yield inputs

    def _update(self, loss: Tensor) -> None:
        """Take a step; one that is skipped leaves the method and the schedule as they are."""
        self.updater.backward(loss)
        if self.updater.apply():
            self.progress.last_rates = self.updater.rates

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """Encoder and head that are kept: those of the method's chosen candidate."""
        return self.method.candidate(self.method.chosen, *self._trained)

    @property
    def _trained(self) -> tuple[nn.Module, nn.Module]:
        """Encoder and head that are trained, or their averages, if there are any."""
        if self.average is not None:
            return self.average.encoder, self.average.head
        return self.method.downstream_encoder, self.method.head

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None
        )

    def collect_steps(self) -> None:
        """Sum the pending steps over the processes and record them."""
        if not self.pending:
            return
        # The number of pending steps depends on the save points, which must not change a sum.
        values = self.group.sum_in_order(torch.stack(self.pending))
        values[:, :-1] /= self.group.world_size
        self.progress.step_values += values.tolist()
        self.pending = []

    def _named_steps(self) -> list[dict[str, float]]:
        names = ["loss", *self.method.part_names]
        return [dict(zip(names, row[:-1], strict=True)) for row in self.progress.step_values]

    def _step_means(self) -> dict[str, float]:
        steps = self._named_steps()
        metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        num_rows = sum(len(batch) for batch in self.batches.rows(self.progress.epochs_done))
        metrics["train_accuracy"] = sum(row[-1] for row in self.progress.step_values) / num_rows
        for name, rate in self.progress.last_rates.items():
            metrics[f"lr_{name}"] = rate
        return metrics

    def _validate(self) -> dict[str, float]:
        """Compute the validation metrics of the method's best candidate."""
        metric, found = METRICS[self.config.training.metric], dict[str, float]()
        for index in range(self.method.num_candidates):
            measures, answers = self._measured(*self.method.candidate(index, *self._trained))
            if not found or metric.score(measures[metric.measure]) > metric.score(
                found[metric.measure]
            ):
                self.method.chosen, found, self.answers = index, measures, answers
        return found

    @torch.inference_mode()
    def _measured(self, encoder: nn.Module, head: nn.Module) -> tuple[dict[str, float], Tensor]:
        """Compute the validation metrics and the answers; each image counts once."""
        self.method.eval()
        num_images, world_size = len(self.data.validation), self.group.world_size
        parts = [range(num_images)[rank::world_size] for rank in range(world_size)]
        rows = list(parts[self.group.rank])
        batches = [rows[at : at + EVALUATION_ROWS] for at in range(0, len(rows), EVALUATION_ROWS)]
        metric = self.config.training.metric
        totals = ValidationTotals(len(self.data.classes), num_images, self.device, metric)
        for pixels, labels in self.data.validation_batches(batches):
            self._on_progress()
            images = self.batches.images(pixels)
            with self._autocast():
                logits = head(encoder(images))
            totals.add(logits, labels.to(self.device))
        measures = totals.measures(self.group, [len(part) for part in parts])
        order = torch.tensor([row for part in parts for row in part]).argsort()
        return measures, totals.answers.cpu()[order]


def _amp_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "auto":
        if device.type != "cuda":
            return None
        # Where bfloat16 is emulated (before Ampere) it is slower than no mixed precision at all.
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_native else torch.float16
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
