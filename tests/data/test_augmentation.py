"""RandAugment, TrivialAugment and random erasing in the training views."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as of_torchvision
from PIL import Image

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.augmentation import augmented
from drtune_ray.data.views import ViewMaker, _seeded
from drtune_ray.values import digest
from tests.conftest import noise_image
from tests.data.test_views import changed_keys, maker

IMAGE = noise_image("an image", 40)
BILINEAR = of_torchvision.InterpolationMode.BILINEAR
OPERATIONS = {
    "rand_augment": of_torchvision.RandAugment(2, 17, 31, BILINEAR, [128] * 3),
    "trivial_augment": of_torchvision.TrivialAugmentWide(31, BILINEAR, [128] * 3),
}


def views(config: dict[str, Any], number: int = 40) -> list[np.ndarray[Any, Any]]:
    made = maker(**config)
    return [made.training_view(IMAGE, "hash", view) for view in range(number)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_view_is_cropped_and_flipped_then_augmented_by_torchvision(name: str) -> None:
    """The same draws in the same order: timm's crop and flip, torchvision's operations."""
    found = views({"augmentation": name, "augmentation_magnitude": 17})
    crop, flip, jitter, as_tensor = maker()._augment.transforms
    for view, pixels in enumerate(found):
        with _seeded(int(digest(0, "hash", view), 16)):
            image = OPERATIONS[name](jitter(flip(crop(IMAGE))))
            assert np.array_equal(pixels, as_tensor(image)), view
    plain = views({})
    assert sum(np.array_equal(*pair) for pair in zip(found, plain, strict=True)) < len(plain) / 2


def test_magnitude_0_leaves_what_has_a_strength() -> None:
    """Operations without a strength (equalize, autocontrast) may still change an image."""
    plain = views({}, 60)

    def share_changed(magnitude: int) -> float:
        config = {"augmentation": "rand_augment", "augmentation_magnitude": magnitude}
        pairs = zip(views(config, 60), plain, strict=True)
        return float(np.mean([np.abs(a.astype(int) - b).mean() > 2 for a, b in pairs]))

    assert share_changed(0) < 0.6 < share_changed(30)


def test_an_erased_rectangle_is_grey_and_the_rest_is_the_view_without() -> None:
    side = 32
    plain, erased = views({}), views({"random_erasing": 1.0})
    for before, after in zip(plain, erased, strict=True):
        changed = (before != after).any(0)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = after[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == 128).all()
        share = box[0].size / side**2
        assert 0.01 < share < 0.35  # 2 to 33 %, in whole pixels
        assert 0.25 < box.shape[1] / box.shape[2] < 4
        assert changed.sum() > 0.9 * box[0].size  # nothing outside of the box


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_the_probability_of_erasing(probability: float) -> None:
    number = 200
    pairs = zip(views({}, number), views({"random_erasing": probability}, number), strict=True)
    num_erased = sum(not np.array_equal(*pair) for pair in pairs)
    assert abs(num_erased - probability * number) <= 3 * (number * 0.21) ** 0.5 * (probability > 0)


@pytest.mark.parametrize("name", [*OPERATIONS, "none"])
def test_views_are_seeded_by_image_view_and_seed(name: str) -> None:
    config = {"augmentation": name, "random_erasing": 0.5}
    first = views(config, 6)
    torch.manual_seed(99)
    np.random.seed(99)
    again = views(config, 6)
    assert all(map(np.array_equal, first, again))
    others = [
        maker(**config).training_view(IMAGE, "other hash", 0),
        maker(**config, view_seed=1).training_view(IMAGE, "hash", 0),
    ]
    assert len({array.tobytes() for array in (*first, *others)}) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"augmentation": "rand_augment"},
        {"augmentation": "trivial_augment"},
        {"random_erasing": 0.25},
        {"random_erasing": 0.250001},
    ],
)
def test_the_key_changes_with_them(change: dict[str, Any]) -> None:
    assert changed_keys(maker(), maker(**change)) == "training"
    other = {"augmentation": "rand_augment", "augmentation_magnitude": 10, "random_erasing": 0.25}
    assert changed_keys(maker(**other), maker(**change)) == "training"


def test_without_them_the_transform_is_timms_own() -> None:
    """Tables that were prepared before they existed keep their names."""
    config = DataConfig(train="images", image_size=32)
    plain = maker()._augment
    assert augmented(plain, config) is plain
    assert [type(step).__name__ for step in plain.transforms] == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "ColorJitter",
        "MaybePILToTensor",
    ]
    assert changed_keys(maker(), maker(augmentation_magnitude=3)) == "none"


@pytest.mark.parametrize("name", OPERATIONS)
def test_random_states_and_evaluation_are_untouched(name: str) -> None:
    config = DataConfig(train="images", image_size=32, augmentation=name, random_erasing=1.0)
    made = ViewMaker(config, "bicubic")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    made.training_view(IMAGE, "hash", 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(made.evaluation_view(IMAGE), maker().evaluation_view(IMAGE))
    small = Image.new("RGB", (3, 2), "red")  # every operation takes it
    for view in range(20):
        assert made.training_view(small, "hash", view).shape == (3, 32, 32)
