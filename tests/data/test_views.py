from __future__ import annotations

import random
import re
import resource
from types import ModuleType
from typing import Any

import numpy as np
import PIL
import PIL.Image
import pytest
import timm
import torch
import torchvision

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.views import ViewMaker
from tests.conftest import noise_image

IMAGE = noise_image("an image", 40)


def maker(**values: Any) -> ViewMaker:
    return ViewMaker(DataConfig(train="images", **{"image_size": 32, **values}), "bicubic")


def test_training_view__same_image_and_view_same_pixels() -> None:
    first = maker().training_view(IMAGE, "hash", 3)
    random.seed(99)
    torch.manual_seed(99)
    assert np.array_equal(first, maker().training_view(IMAGE, "hash", 3))


def test_training_view__differs_by_view_image_and_seed() -> None:
    views = maker()
    pixels = [views.training_view(IMAGE, "hash", view) for view in range(6)]
    pixels.append(views.training_view(IMAGE, "other hash", 0))
    pixels.append(maker(view_seed=1).training_view(IMAGE, "hash", 0))
    assert len({array.tobytes() for array in pixels}) == len(pixels)


def test_training_view__order_of_calls_does_not_matter() -> None:
    forwards = [maker().training_view(IMAGE, "hash", view) for view in range(4)]
    backwards = [maker().training_view(IMAGE, "hash", view) for view in reversed(range(4))]
    assert all(map(np.array_equal, forwards, reversed(backwards)))


def test_views__shape_and_type() -> None:
    for pixels in (maker().training_view(IMAGE, "hash", 0), maker().evaluation_view(IMAGE)):
        assert pixels.shape == (3, 32, 32)
        assert pixels.dtype == np.uint8
        assert pixels.std() > 10


@pytest.mark.parametrize("resize", ["shorter_side", "square"])
def test_evaluation_view__resize(resize: str) -> None:
    """Row m of METHOD.md: the authors squeeze to a square; timm keeps the proportions."""
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 40:] = 255
    wide[:, :8, 0], wide[:, -8:, 0] = 200, 50  # what lies at the ends
    pixels = maker(image_size=28, crop_fraction=0.875, evaluation_resize=resize).evaluation_view(
        PIL.Image.fromarray(wide)
    )
    # 80 columns become 32, of which 28 are kept, or 64, of which the middle 28 are.
    assert bool(pixels[0, :, 0].mean() > 50) == (resize == "square")
    assert bool(pixels[0, :, -1].mean() < 200) == (resize == "square")
    assert pixels[1, :, :13].max() < 10 < 245 < pixels[1, :, 15:].min()


@pytest.mark.parametrize("size", [(4, 30000), (30000, 3)])
def test_views__very_thin_picture_takes_little_memory(size: tuple[int, int]) -> None:
    picture = PIL.Image.new("RGB", size, "black")
    width, height = size
    middle = (0, 14990, 4, 15010) if height > width else (14990, 0, 15010, 3)
    picture.paste("white", middle)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    views = maker(image_size=224)
    pixels = views.evaluation_view(picture)
    assert pixels.shape == views.training_view(picture, "hash", 0).shape == (3, 224, 224)
    assert pixels.min() == 255  # the central crop keeps less than its long side of 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize("size", [(16, 256), (17, 255), (16, 257), (8, 300)])
def test_evaluation_view__the_middle_of_a_thin_picture(size: tuple[int, int]) -> None:
    """Cutting the ends off changes no pixel: to the rounding of the resized length."""
    whole = noise_image("thin", 300).resize(size)
    found = maker().evaluation_view(whole).astype(int)
    transform = maker()._evaluate
    expected = np.asarray(transform(whole), dtype=np.uint8).astype(int)
    assert np.abs(found - expected).max() <= (0 if max(size) <= 16 * min(size) else 40)
    assert np.abs(found - expected).mean() < 2


def test_evaluation_view__thin_picture_squashed() -> None:
    picture = PIL.Image.new("RGB", (4, 400), "black")
    picture.paste("white", (0, 0, 4, 40))  # an end
    assert (
        maker(evaluation_resize="square", crop_fraction=1.0).evaluation_view(picture).max() == 255
    )


def test_views__global_random_states_are_untouched() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index,union-attr]
    views = maker()
    views.training_view(IMAGE, "hash", 0)
    views.evaluation_view(IMAGE)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index,union-attr]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_training_view__random_states_come_back_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    views = maker()
    monkeypatch.setattr(views, "_augment", lambda image: 1 / 0)
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        views.training_view(IMAGE, "hash", 0)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_training_view__flip_and_crop_follow_the_config(flip: float) -> None:
    whole = maker(horizontal_flip=flip, crop_scale_min=1.0, image_size=40)
    # The crop's aspect ratio is drawn too; where no such crop fits, timm takes the whole image.
    views = [whole.training_view(IMAGE, "hash", view) for view in range(12)]
    expected = np.asarray(IMAGE).transpose(2, 0, 1)
    other = expected[:, :, ::-1]
    if flip:
        expected, other = other, expected
    assert any(np.array_equal(view, expected) for view in views)
    assert not any(np.array_equal(view, other) for view in views)


def test_evaluation_view__centre_crop() -> None:
    pixels = maker(image_size=20, crop_fraction=0.5).evaluation_view(IMAGE)
    assert np.array_equal(pixels, np.asarray(IMAGE).transpose(2, 0, 1)[:, 10:30, 10:30])


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"view_seed": 1}, "training"),
        ({"image_size": 48}, "both"),
        ({"crop_scale_min": 0.5}, "training"),
        # The transform's own text rounds it to 0.4.
        ({"crop_scale_min": 0.40001}, "training"),
        ({"horizontal_flip": 0.0}, "training"),
        ({"crop_fraction": 1.0}, "evaluation"),
        ({"evaluation_resize": "square"}, "evaluation"),
    ],
)
def test_keys__change_with_everything_that_changes_pixels(
    change: dict[str, Any], changed: str
) -> None:
    assert changed_keys(maker(), maker(**change)) == changed


def test_keys__interpolation_too() -> None:
    config = DataConfig(train="images", image_size=32)
    makers = [ViewMaker(config, name) for name in ("bilinear", "bicubic")]
    assert changed_keys(*makers) == "both"


@pytest.mark.parametrize("module", [timm, torchvision, PIL])
def test_keys__versions_of_what_makes_the_pixels(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    before = maker()
    monkeypatch.setattr(module, "__version__", "0.0")
    assert changed_keys(before, maker()) == "both"


def changed_keys(first: ViewMaker, second: ViewMaker) -> str:
    changed = [
        first.training_key != second.training_key,
        first.evaluation_key != second.evaluation_key,
    ]
    names = {(True, False): "training", (False, True): "evaluation", (True, True): "both"}
    return names.get((changed[0], changed[1]), "none")


def test_key__names_no_address_that_another_process_would_not_have() -> None:
    views = maker()
    text = repr(views._augment) + repr(views._evaluate)
    assert not re.search(r"0x[0-9a-f]{6,}", text)
    assert changed_keys(maker(), views) == "none"
    assert changed_keys(maker(train_per_class=3, views=2), views) == "none"
