"""A classifier applied to images: decoded in threads a batch ahead, on a GPU where there is one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from drtune_ray.data.views import ViewMaker
from drtune_ray.results.winner import Winner
from drtune_ray.training.frozen_features import Normalizer

BATCH_ROWS = 64
Item = TypeVar("Item")
Made = TypeVar("Made")


class Classifier:
    """A trained model on a device.

    Args:
        winner: The model and what it expects of images.
        device: Device; by default a GPU where there is one.
        batch_size: Number of images that go through the model at a time.
    """

    def __init__(
        self, winner: Winner, device: str | None = None, batch_size: int = BATCH_ROWS
    ) -> None:
        self.winner, self.batch_size = winner, batch_size
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._views = ViewMaker(winner.trial.data, winner.normalization.interpolation)
        self._normalizer = Normalizer(winner.normalization, self._device)
        model = winner.model.to(self._device)
        self._model = model.to(memory_format=torch.channels_last)

    def logits(
        self, items: Iterable[Item], open_image: Callable[[Item], Image.Image | Exception]
    ) -> Iterator[tuple[list[tuple[Item, Exception | None]], Tensor]]:
        """Yield batches: the items, each with why it has no image, and logits (n, C) of the others.

        Args:
            items: Whatever `open_image` takes.
            open_image: Return the RGB image of an item, or the error for which it has none; called
                in threads.
        """

        def view(item: Item) -> Tensor | Exception:
            image = open_image(item)
            if isinstance(image, Exception):
                return image
            return torch.tensor(self._views.evaluation_view(image))

        for part, made in in_batches(view, items, self.batch_size):
            views = [each for each in made if isinstance(each, Tensor)]
            errors = [None if isinstance(each, Tensor) else each for each in made]
            yield list(zip(part, errors, strict=True)), self._forward(views)

    @torch.inference_mode()
    def _forward(self, views: list[Tensor]) -> Tensor:
        if not views:
            return torch.empty(0, len(self.winner.classes))
        pixels = torch.stack(views).to(self._device)
        logits: Tensor = self._model(self._normalizer(pixels)).cpu()
        return logits


def in_batches(
    make: Callable[[Item], Made], items: Iterable[Item], batch_size: int
) -> Iterator[tuple[list[Item], list[Made]]]:
    """Yield batches of items with what is made of each, in threads, a batch ahead."""
    rest = iter(items)
    # Pillow decodes and resizes without Python's lock.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        ahead: deque[tuple[list[Item], list[Future[Made]]]] = deque()
        while part := list(islice(rest, batch_size)):
            ahead.append((part, [threads.submit(make, item) for item in part]))
            if len(ahead) > 1:
                yield _result(*ahead.popleft())
        for waiting in ahead:
            yield _result(*waiting)


def _result(part: list[Item], made: list[Future[Made]]) -> tuple[list[Item], list[Made]]:
    return part, [future.result() for future in made]
