"""State of one trial: modules, optimiser and progress, which checkpoints hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from torch import Tensor

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import TrainingData
from drtune_ray.method import DRTune
from drtune_ray.training.backbones import Backbone
from drtune_ray.training.checkpoint import TrialFolder
from drtune_ray.training.distributed import (
    ProcessGroup,
    barrier,
    data_parallel,
    gather_objects,
    is_distributed,
)
from drtune_ray.training.frozen_features import Normalizer
from drtune_ray.training.model import (
    build_method,
    classifier_state,
    derived_seed,
    generator,
    method_scale,
    set_training_mode,
)
from drtune_ray.training.optim import build_optimizer, build_schedule, learning_rates
from drtune_ray.training.reports import (
    COMPLETED,
    DIVERGED,
    PATIENCE,
    EpochRecord,
    EpochReport,
)
from drtune_ray.training.step_signals import StepSignals
from drtune_ray.training.validation import ValidationTotals
from drtune_ray.training.weights_file import NORMALIZATION

EVALUATION_ROWS = 64
FROZEN_PREFIX = "pretrained_encoder."


@dataclass
class _Progress:
    epochs_done: int = 0
    steps_done: int = 0
    epoch_seconds: float = 0.0
    best_val_accuracy: float = -1.0
    best_epoch: int = 0
    outcome: str | None = None
    last_rates: dict[str, float] = field(default_factory=dict)
    step_values: list[list[float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


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
        self.normalizer = Normalizer(backbone.normalization, device)
        self.group = ProcessGroup()
        # Dropout and the like draw from torch's global generator: one seed for each rank.
        torch.manual_seed(derived_seed(config.seed, "training", self.group.rank) % 2**32)
        method = build_method(
            config, backbone, len(data.classes), len(data.train), not data.has_features
        )
        if config.training.batch_norm == "synchronised" and is_distributed():
            # timm's function keeps the activation within a BatchNormAct2d; torch's drops it.
            convert = convert_sync_batchnorm
            method.downstream_encoder = convert(method.downstream_encoder)  # type: ignore[no-untyped-call]
        self.dtype = torch.float64 if config.training.precision == "float64" else torch.float32
        method = method.to(device=device, dtype=self.dtype)
        self.method = method.to(memory_format=torch.channels_last)
        self.module = data_parallel(self.method, device)
        self.optimizer = build_optimizer(
            self.method.downstream_encoder,
            self.method.head,
            config.optim,
            method_scale(config, len(data.train)).head_lr_multiplier,
        )
        self.steps_per_epoch = len(self._global_batches(0))
        self.schedule = build_schedule(
            self.optimizer, config.optim, config.training.epochs, self.steps_per_epoch
        )
        self.amp_dtype = _amp_dtype(config.training.precision, device)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.amp_dtype == torch.float16 and device.type == "cuda"
        )
        self.progress = _Progress()
        self.signals = StepSignals(self.group)
        self.pending: list[Tensor] = []
        self.part_names: list[str] = ["cross_entropy"]
        if isinstance(method, DRTune):
            self.part_names.append("distribution_regularization")
        self.is_best = False
        self.has_trained = False

    def warm_up_bank(self) -> None:
        """Fill the bank with the first K images of a pass over the training data."""
        if not isinstance(self.method, DRTune):
            return
        order = self._global_batches(-1, drop_last=False)
        rows = [row for batch in order for row in batch][: self.method.bank.bank_size]
        size = self.config.training.batch_size
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        for batch in self._batches(batches, epoch=-1):
            with self._autocast():
                self.method.warm_up_bank(*batch)

    def steps(self, wants_save: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Train the rest of the present epoch; yield after each step whether all was finite so far.

        On an accelerator the answer is `LAG` steps late: by then the weights may be broken.

        Args:
            wants_save: Function called at each step; see `StepSignals.take_save`.
        """
        progress = self.progress
        set_training_mode(self.method, self.config.training.batch_norm)
        if progress.steps_done == 0:
            self.method.begin_epoch()
        batches = self._global_batches(progress.epochs_done)[progress.steps_done :]
        for images, labels, features, shares in self._batches(batches, progress.epochs_done):
            with self._autocast():
                output = self.module(images, labels, features, shares)
            self.signals.add(output.is_finite, wants_save())
            if self.signals.has_diverged():
                yield False
                return
            self._update(output.loss)
            correct = (output.logits.argmax(1) == labels[: shares[self.group.rank]]).sum()
            values = [output.loss.detach(), *output.parts.values(), correct]
            self.pending.append(torch.stack([value.double() for value in values]))
            progress.steps_done += 1
            yield True

    def finish_epoch(self) -> None:
        """Validate, record the epoch and decide whether the trial has ended."""
        started = time.monotonic()
        progress = self.progress
        if self.signals.has_diverged(wait=True):
            progress.outcome = DIVERGED
            return
        self._collect_steps()
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
        progress.history.append(
            {
                "epoch": progress.epochs_done,
                "time_ms": int(time.time() * 1000),
                "metrics": metrics,
                "steps": self._named_steps(),
            }
        )
        progress.step_values, progress.epoch_seconds = [], 0.0
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
        if validation["val_accuracy"] > progress.best_val_accuracy:
            progress.best_val_accuracy = validation["val_accuracy"]
            progress.best_epoch, self.is_best = progress.epochs_done, True
        # The objective comes first: MLflow's comparisons open on the metric logged first.
        return {"best_val_accuracy": progress.best_val_accuracy} | validation

    def report(self) -> EpochReport:
        """Return the present state as a report."""
        history = tuple(EpochRecord(**record) for record in self.progress.history)
        return EpochReport(
            history[-1] if history else None, history, self.progress.outcome, self.save
        )

    def save(self, folder: TrialFolder) -> None:
        """Write the checkpoint; after a best epoch, write its weights first."""
        self._collect_steps()
        state = self._state()
        if self.group.rank == 0:
            if self.is_best:
                folder.save_best(
                    {
                        "model": classifier_state(self.method),
                        "record": self.progress.history[-1],
                        NORMALIZATION: asdict(self.normalization),
                    }
                )
            folder.save(state, self.progress.epochs_done, self.progress.steps_done)
        barrier()

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        own = {k for k in self.method.state_dict() if k.startswith(FROZEN_PREFIX)}
        missing, unexpected = self.method.load_state_dict(state["method"], strict=False)
        assert set(missing) <= own and not unexpected, (missing, unexpected)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:  # empty after training with another precision or device
            self.scaler.load_state_dict(state["scaler"])
        self.progress = _Progress(**state["progress"])
        self._load_random_states(state["random"])

    def _load_random_states(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore the random states of this rank; seed those that the checkpoint does not hold.

        These are all states of a rank that is new, and a CUDA device's after training on CPUs.
        """
        rank, progress = self.group.rank, self.progress
        at = (rank, progress.epochs_done, progress.steps_done)
        torch.manual_seed(derived_seed(self.config.seed, "training", *at) % 2**32)
        known = states[rank] if rank < len(states) else {}
        if "cpu" in known:
            torch.set_rng_state(known["cpu"])
        if "cuda" in known and self.device.type == "cuda":
            torch.cuda.set_rng_state(known["cuda"], self.device)

    def _state(self) -> dict[str, Any]:
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        method = self.method.state_dict()
        return {
            "method": {k: v for k, v in method.items() if not k.startswith(FROZEN_PREFIX)},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dict(vars(self.progress)),
            "random": gather_objects(random_state),
        }

    def _global_batches(self, epoch: int, drop_last: bool | None = None) -> list[list[int]]:
        """Rows of each step of an epoch, for all processes together."""
        training = self.config.training
        drop_last = training.drop_last if drop_last is None else drop_last
        order = generator(self.config.seed, "order", epoch)
        rows = torch.randperm(len(self.data.train), generator=order).tolist()
        size = training.batch_size
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        return batches[:-1] if drop_last and len(batches[-1]) < size else batches

    def _batches(
        self, global_batches: Sequence[Sequence[int]], epoch: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None, list[int]]]:
        """Yield this process's part of each batch: images, labels, z^p, and the rows of each."""
        view = self.data.view_of_epoch(epoch)
        shares = [_shares(len(batch), self.group.world_size) for batch in global_batches]
        loaded = []
        for batch, counts in zip(global_batches, shares, strict=True):
            # Consecutive rows, so that gathering in the order of the ranks restores the batch.
            start = sum(counts[: self.group.rank])
            own = list(batch[start : start + counts[self.group.rank]])
            # A process without rows of its own runs one spare row: its graph stays whole.
            loaded.append(own or list(batch[:1]))
        pictures = self.data.training_batches(loaded, view)
        for counts, rows, (pixels, labels) in zip(shares, loaded, pictures, strict=True):
            self._on_progress()
            features = self.data.pretrained_features(rows, view)
            if features is not None:
                if self.device.type == "cuda":  # a copy from pageable memory would be waited for
                    features = features.pin_memory()
                features = features.to(self.device, non_blocking=True)
            yield (
                self._images(pixels),
                labels.to(self.device, non_blocking=True),
                features,
                counts,
            )

    def _images(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device, non_blocking=True)
        return self.normalizer(pixels).to(self.dtype)

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.progress.last_rates = learning_rates(self.optimizer)
        self.schedule.step()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None
        )

    def _collect_steps(self) -> None:
        """Sum the pending steps over the processes and record them."""
        if not self.pending:
            return
        # The number of pending steps depends on the save points, which must not change a sum.
        values = self.group.sum_in_order(torch.stack(self.pending))
        values[:, :-1] /= self.group.world_size
        self.progress.step_values += values.tolist()
        self.pending = []

    def _named_steps(self) -> list[dict[str, float]]:
        names = ["loss", *self.part_names]
        return [dict(zip(names, row[:-1], strict=True)) for row in self.progress.step_values]

    def _step_means(self) -> dict[str, float]:
        steps = self._named_steps()
        metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        num_rows = sum(len(batch) for batch in self._global_batches(self.progress.epochs_done))
        metrics["train_accuracy"] = sum(row[-1] for row in self.progress.step_values) / num_rows
        for name, rate in self.progress.last_rates.items():
            metrics[f"lr_{name}"] = rate
        if isinstance(self.method, DRTune):
            metrics["bank_rows"] = float(len(self.method.bank))
        return metrics

    @torch.inference_mode()
    def _validate(self) -> dict[str, float]:
        """Compute the validation metrics; each image counts once."""
        self.method.eval()
        rows = list(range(len(self.data.validation)))[self.group.rank :: self.group.world_size]
        batches = [rows[at : at + EVALUATION_ROWS] for at in range(0, len(rows), EVALUATION_ROWS)]
        totals = ValidationTotals(len(self.data.classes), self.device)
        for pixels, labels in self.data.validation_batches(batches):
            self._on_progress()
            images = self._images(pixels)
            with self._autocast():
                logits = self.method.head(self.method.downstream_encoder(images))
            totals.add(logits, labels.to(self.device))
        return totals.measures(self.group.sum(totals.sums))


def _shares(num_rows: int, world_size: int) -> list[int]:
    """Number of rows of a global batch for each process; the first ones get one more."""
    short, num_longer = divmod(num_rows, world_size)
    return [short + (rank < num_longer) for rank in range(world_size)]


def _amp_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "auto":
        if device.type != "cuda":
            return None
        # Where bfloat16 is emulated (before Ampere) it is slower than no mixed precision at all.
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_native else torch.float16
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
