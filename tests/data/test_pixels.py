from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from drtune_ray.data.pixels import decode
from tests.conftest import noise_image
from tests.data.pictures import encoded


def transparent(mode: str) -> Image.Image:
    """Left half red, right half wholly transparent."""
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (4, 0, 8, 4))
    if mode == "P":
        image = Image.new("P", (8, 4), 0)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.paste(1, (4, 0, 8, 4))
        return image
    return image.convert(mode)


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("PNG", "RGBA", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("PNG", "LA", {}),
        ("PNG", "P", {"transparency": 1}),
        ("GIF", "P", {"transparency": 1}),
    ],
)
def test_decode__transparency_is_laid_on_white(
    form: str, mode: str, options: dict[str, Any]
) -> None:
    image = decode(encoded(transparent(mode), form, **options))
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels[:, 4:] == 255).all()
    red = [76, 76, 76] if mode == "LA" else [255, 0, 0]
    assert np.abs(pixels[:, :4].astype(int) - red).max() <= 1


def test_decode__half_transparent() -> None:
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 51))
    assert np.abs(np.asarray(decode(encoded(image, "PNG"))).astype(int) - 204).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "CMYK"])
def test_decode__every_mode_becomes_rgb(mode: str) -> None:
    form = "TIFF" if mode == "CMYK" else "PNG"
    image = decode(encoded(noise_image("x", 8).convert(mode), form))
    assert (image.mode, image.size) == ("RGB", (8, 8))


def test_decode__sixteen_bits_keep_their_contrast() -> None:
    # BUG found: Pillow's conversion cuts 16-bit greys at 255, so all but the darkest 0.4 % of a
    # microscope's or an X-ray's picture becomes white, silently.
    greys = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = np.asarray(decode(encoded(Image.fromarray(greys), "PNG")))[..., 0]
    assert np.abs(pixels - greys / 257.0).max() <= 1.0
