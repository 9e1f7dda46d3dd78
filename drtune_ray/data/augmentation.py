"""Augmentations of the training views beside crop and flip, all of torchvision.

They draw from torch's global generator alone, which :class:`~drtune_ray.data.views.ViewMaker` seeds
for each (image, view).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drtune_ray.config.inputs import DataConfig

if TYPE_CHECKING:
    from torchvision.transforms import Compose

NUM_OPERATIONS = 2  # of RandAugment, as in its paper's ImageNet settings
GREY = 128  # of erased rectangles, and beside images that are shifted or rotated
ERASED_AREA, ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)  # Zhong et al. 2020, sec. 4


def augmented(crop_and_flip: Compose, config: DataConfig) -> Compose:
    """Add the augmentations of a configuration to the crop and flip of an image.

    Args:
        crop_and_flip: timm's training transform of a PIL image, whose last step makes a tensor.
        config: `augmentation`, `augmentation_magnitude` and `random_erasing`.

    Returns:
        The same transform where the configuration asks for none.
    """
    from torchvision.transforms import Compose, RandomErasing

    *steps, as_tensor = crop_and_flip.transforms
    steps += [*_operations(config), as_tensor]
    if config.random_erasing:
        grey = (GREY, GREY, GREY)
        steps.append(RandomErasing(config.random_erasing, ERASED_AREA, ERASED_ASPECT, grey))
    return crop_and_flip if len(steps) == len(crop_and_flip.transforms) else Compose(steps)


def _operations(config: DataConfig) -> list[Any]:
    """RandAugment or TrivialAugment, or neither."""
    from torchvision.transforms import InterpolationMode, RandAugment, TrivialAugmentWide

    common: dict[str, Any] = {"interpolation": InterpolationMode.BILINEAR, "fill": [GREY] * 3}
    if config.augmentation == "rand_augment":
        return [RandAugment(NUM_OPERATIONS, config.augmentation_magnitude, **common)]
    if config.augmentation == "trivial_augment":
        return [TrivialAugmentWide(**common)]
    return []
