"""The batches of a trial: rows of each step, and each process's part of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.dataset import TrainingData
from drtune_ray.training.class_balance import epoch_rows
from drtune_ray.training.distributed import ProcessGroup
from drtune_ray.training.frozen_features import Normalizer
from drtune_ray.training.mixing import own_rows, part_of
from drtune_ray.training.model import generator

# Of this process: images, labels, z^p where it is known, and the number of rows of each process.
Inputs = tuple[Tensor, Tensor, Tensor | None, list[int]]


class TrainingBatches:
    """Batches of a trial's training images.

    Args:
        config: Configuration of the trial.
        data: Training images.
        normalizer: Pixels to normalised images on the device.
        group: Processes of the trial.
        device: Device to train on.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: TrainingData,
        normalizer: Normalizer,
        group: ProcessGroup,
        device: torch.device,
    ) -> None:
        self._config, self._data, self._device = config, data, device
        self._normalizer, self._group = normalizer, group

    def rows(self, epoch: int, drop_last: bool | None = None) -> list[list[int]]:
        """Rows of each step of an epoch, for all processes together; see `epoch_rows`."""
        training = self._config.training
        drop_last = training.drop_last if drop_last is None else drop_last
        order = generator(self._config.seed, "order", epoch)
        rows = epoch_rows(self._data.train.labels, self._config.data.sampling, order)
        size = training.batch_size
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        return batches[:-1] if drop_last and len(batches[-1]) < size else batches

    def inputs(
        self, global_batches: Sequence[Sequence[int]], epoch: int, *, are_mixed: bool
    ) -> Iterator[Inputs]:
        """Yield this process's part of each batch: images, labels, z^p, and the rows of each.

        Args:
            global_batches: Rows of each batch, as :meth:`rows` returns them.
            epoch: Number of the epoch, which decides the view.
            are_mixed: Whether partners of other processes follow its own rows, without z^p.
        """
        view = self._data.view_of_epoch(epoch)
        shares = [divided(len(batch), self._group.world_size) for batch in global_batches]
        owned, loaded = [], []
        for batch, counts in zip(global_batches, shares, strict=True):
            # Consecutive rows, so that gathering in the order of the ranks restores the batch.
            # A process without rows of its own runs one spare row: its graph stays whole.
            start, stop = own_rows(counts, self._group.rank)
            owned.append(list(batch[start:stop]))
            positions = part_of(len(batch), start, stop).positions if are_mixed else None
            loaded.append(owned[-1] if positions is None else [batch[at] for at in positions])
        pictures = self._data.training_batches(loaded, view)
        for counts, rows, (pixels, labels) in zip(shares, owned, pictures, strict=True):
            yield (
                self.images(pixels),
                labels.to(self._device, non_blocking=True),
                self._features(rows, view),
                counts,
            )

    def images(self, pixels: Tensor) -> Tensor:
        """Move pixels to the device, normalised."""
        return self._normalizer(pixels.to(self._device, non_blocking=True))

    def _features(self, rows: Sequence[int], view: int) -> Tensor | None:
        features = self._data.pretrained_features(rows, view)
        if features is None:
            return None
        if self._device.type == "cuda":  # a copy from pageable memory would be waited for
            features = features.pin_memory()
        return features.to(self._device, non_blocking=True)


def divided(num_rows: int, world_size: int) -> list[int]:
    """Number of rows of a global batch for each process; the first ones get one more."""
    short, num_longer = divmod(num_rows, world_size)
    return [short + (rank < num_longer) for rank in range(world_size)]
