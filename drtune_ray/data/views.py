"""Views of an image: timm's transforms, seeded per (image, view)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.augmentation import augmented
from drtune_ray.values import digest

Pixels = NDArray[np.uint8]
# Long side over short side above which the ends of a picture are cut off before it is resized: a
# picture of 4 x 30,000 would become one of 256 x 1,920,000. The central crop keeps less than this.
MAX_ASPECT = 16


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel that the weights expect, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"


class ViewMaker:
    """Makes the training views and the evaluation view of an image.

    Args:
        config: `image_size`, `view_seed`, and the settings of crops and resizing.
        interpolation: timm's name of the interpolation that the pretrained weights expect.

    Attributes:
        training_key: Hash of what decides the training views, except the image's content.
        evaluation_key: Hash of what decides the evaluation view, except the image's content.
    """

    def __init__(self, config: DataConfig, interpolation: str) -> None:
        import timm
        import torchvision
        from timm.data.transforms_factory import create_transform

        self._seed = config.view_seed
        self._is_cropped = config.evaluation_resize == "shorter_side"
        # With `use_prefetcher` timm returns uint8 pixels; the device normalises them.
        common: dict[str, Any] = {
            "input_size": config.image_size,
            "interpolation": interpolation,
            "use_prefetcher": True,
        }
        self._augment = augmented(
            create_transform(
                is_training=True,
                scale=(config.crop_scale_min, 1.0),
                hflip=config.horizontal_flip,
                color_jitter=0.0,
                **common,
            ),
            config,
        )
        self._evaluate = create_transform(
            is_training=False,
            crop_pct=config.crop_fraction,
            crop_mode="squash" if config.evaluation_resize == "square" else "center",
            **common,
        )
        # Releases of each have changed pixels: decoding, resampling, random crops.
        versions = [timm.__version__, torchvision.__version__, PIL.__version__]
        drawn = [config.view_seed, config.crop_scale_min, config.horizontal_flip]
        # The settings are hashed too, because the transform's text rounds them to four digits.
        self.training_key = digest(
            repr(self._augment), config.image_size, *drawn, interpolation, *versions
        )
        self.evaluation_key = digest(
            repr(self._evaluate), config.image_size, config.crop_fraction, interpolation, *versions
        )

    def training_view(self, image: Image.Image, content_hash: str, view: int) -> Pixels:
        """Return view number `view` of an image, (3, S, S); the same at every call."""
        seed = int(digest(self._seed, content_hash, view), 16)
        with _seeded(seed):
            return _pixels(self._augment, image)

    def evaluation_view(self, image: Image.Image) -> Pixels:
        """Return the view on which models are compared: resize and centre crop, (3, S, S)."""
        return _pixels(self._evaluate, _middle(image) if self._is_cropped else image)


def _pixels(transform: Callable[[Image.Image], Any], image: Image.Image) -> Pixels:
    return np.asarray(transform(image), dtype=np.uint8)


def _middle(image: Image.Image) -> Image.Image:
    """Return the middle of a very thin picture, up to `MAX_ASPECT`; others as they are."""
    limit = MAX_ASPECT * min(image.size)
    left, top = (max(0, side - limit) // 2 for side in image.size)
    if not (left or top):
        return image
    return image.crop((left, top, image.width - left, image.height - top))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that timm and torchvision use, then restore their state."""
    import torch

    python_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
