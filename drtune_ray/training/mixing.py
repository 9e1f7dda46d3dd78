"""Mixup and CutMix: pairs of a batch are mixed for the cross-entropy, by timm's `Mixup`.

The method's part (:class:`~drtune_ray.method.MixedBatch`) takes bank, calibration and DR from the
unmixed images. What is drawn depends on seed, epoch and step alone, and the rows of a pair stand
side by side in the global batch, so that several processes mix as one does: each loads its rows and
at most two of its neighbours'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from drtune_ray.config.trial import TrialConfig
from drtune_ray.method import MixedBatch
from drtune_ray.training.model import derived_seed


@dataclass(frozen=True)
class Part:
    """The part of a global batch that a process loads.

    Attributes:
        positions: Positions in the global batch: its own rows, then partners that are none of them.
        num_own: Number of its own rows.
        partners: Index among the positions of the partner of each own row.
    """

    positions: list[int]
    num_own: int
    partners: list[int]


def part_of(num_rows: int, start: int, stop: int) -> Part:
    """Return the part with rows `start` to `stop` of a global batch and their partners.

    Rows 0 and 1 are partners, 2 and 3, and so on. The last of an odd number takes the row before
    it, a single one itself.
    """
    of = [_partner(at, num_rows) for at in range(start, stop)]
    places = {at: place for place, at in enumerate(dict.fromkeys([*range(start, stop), *of]))}
    return Part(list(places), stop - start, [places[at] for at in of])


def _partner(at: int, num_rows: int) -> int:
    partner = at ^ 1
    return partner if partner < num_rows else max(0, at - 1)


class Mixing:
    """Mixes each batch of a trial, with one draw for the whole batch.

    Args:
        config: `training.mixup` and `training.cutmix`, one of them above 0, and the seed.
        num_classes: C.
    """

    def __init__(self, config: TrialConfig, num_classes: int) -> None:
        training = config.training
        self._seed = config.seed
        self._mix = Mixup(  # type: ignore[no-untyped-call]
            training.mixup, training.cutmix, label_smoothing=0.0, num_classes=num_classes
        )

    def __call__(
        self, images: Tensor, labels: Tensor, part: Part, epoch: int, step: int
    ) -> MixedBatch:
        """Mix the rows of a process with their partners.

        Args:
            images: Images of the part, (rows, 3, S, S).
            labels: Labels of the part, (rows,).
            part: The part.
            epoch: The epoch, from 0.
            step: The step within the epoch, from 0.
        """
        own = part.num_own
        # timm mixes row i with row i from the end.
        order = [*range(own), *reversed(part.partners)]
        index = torch.tensor(order, pin_memory=images.is_cuda).to(images.device, non_blocking=True)
        with _numpy_seeded(derived_seed(self._seed, "mixing", epoch, step) % 2**32):
            mixed, targets = self._mix(images[index], labels[index])
        return MixedBatch(mixed[:own], targets[:own])


def mixing(config: TrialConfig, num_classes: int) -> Mixing | None:
    """Return what mixes the batches of a trial; None where nothing is mixed."""
    training = config.training
    return Mixing(config, num_classes) if training.mixup or training.cutmix else None


def own_rows(shares: Sequence[int], rank: int) -> tuple[int, int]:
    """Return start and stop of the rows of a process; a process without rows takes the first."""
    start = sum(shares[:rank])
    return (start, start + shares[rank]) if shares[rank] else (0, 1)


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, from which timm draws, then restore its state."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
