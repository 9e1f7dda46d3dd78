from __future__ import annotations

import ast
import hashlib
import io
import multiprocessing
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drtune_ray.data import pixels
from drtune_ray.data.pixels import (
    UndecodableImageError,
    WhiteValues,
    as_eight_bits,
    decode,
    examine,
    is_recognised,
    names_an_image,
    white_values,
)
from tests.conftest import noise_image
from tests.data.pictures import (
    ORIENTATION,
    UNWRITABLE,
    encoded,
    exif,
    sixteen_bit_colours,
    twelve_bit_tiff,
)

RAMP = np.linspace(0.0, 1.0, 32 * 32).reshape(32, 32)


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


# ---- more than 8 bits


@pytest.mark.parametrize(
    ("peak", "kind", "white"),
    [
        (255, np.uint16, 255),
        (1023, np.uint16, 1023),
        (4095, np.uint16, 4095),
        (16383, np.uint16, 16383),
        (65535, np.uint16, 65535),
        (4000, np.int32, 4095),
        (65535, np.int32, 65535),
        (1, np.float32, 1),
        (255, np.float32, 255),
        (4095, np.float32, 4095),
    ],
)
def test_decode__keeps_the_contrast_of_any_range(peak: int, kind: Any, white: int) -> None:
    content = encoded(Image.fromarray((RAMP * peak).astype(kind)), "TIFF")
    facts = examine(content)
    whites = white_values([facts.integer_peak], [facts.float_peak])
    assert (whites.floating if kind is np.float32 else whites.integer) == white
    pixels = np.asarray(decode(content, whites))[..., 0]
    assert np.abs(pixels - RAMP * peak * 255 / white).max() <= 1.0
    assert pixels.max() >= 240
    again = np.asarray(decode(as_eight_bits(content, whites)))[..., 0]
    assert np.array_equal(again, pixels)


def test_white_values__of_all_images_of_a_source() -> None:
    assert white_values([None, 12, 3000], [None]) == WhiteValues(4095, 255)
    assert white_values([None], [0.2, 1.0]) == WhiteValues(65535, 1)


@pytest.mark.parametrize("content", [b"P5 2 2 4095\n\0\0\0\1\0\2\0\3", "JPEG2000"])
def test_examine__a_format_that_pillow_scales_keeps_its_range(content: bytes | str) -> None:
    dark = Image.fromarray(np.full((32, 32), 100, np.uint16))
    facts = examine(encoded(dark, content) if isinstance(content, str) else content)
    assert facts.integer_peak == 65535


def test_examine__twelve_bits_that_the_file_declares() -> None:
    dark = twelve_bit_tiff(100, 200)
    assert examine(dark).integer_peak == 4095
    pixels = np.asarray(decode(dark, white_values([4095], [])))[..., 0]
    assert pixels.tolist() == [[6, 12]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[-1000, 3000]], np.int32), "values from -1000 to 3000, but only values from 0"),
        (np.array([[0, 70000]], np.int32), "values from 0 to 70000"),
        (np.array([[-0.5, 1.0]], np.float32), "values from -0.5 to 1"),
        (np.array([[np.nan, 1.0]], np.float32), "values from nan to nan"),
        (np.array([[0.0, np.inf]], np.float32), "values from 0 to inf"),
    ],
)
def test_examine__values_without_a_known_brightness(values: Any, words: str) -> None:
    with pytest.raises(UndecodableImageError, match=words):
        examine(encoded(Image.fromarray(values), "TIFF"))


def test_examine__sixteen_bit_colours_of_which_nothing_is_left() -> None:
    values = np.repeat((RAMP * 4095).astype(np.uint16)[..., None], 3, axis=2)
    with pytest.raises(UndecodableImageError, match="16-bit colours of at most 4095, of which"):
        examine(sixteen_bit_colours(values))
    bright = sixteen_bit_colours(values * 16)
    facts = examine(bright)
    assert (facts.integer_peak, facts.float_peak, facts.is_uniform) == (None, None, False)
    assert np.abs(np.asarray(decode(bright)) - values * 16 / 257.0).max() <= 1.0


@pytest.mark.parametrize(
    ("image", "is_uniform"),
    [
        (Image.new("RGB", (4, 4), (9, 8, 7)), True),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), True),
        (Image.fromarray(np.full((4, 4), 900, np.uint16)), True),
        (noise_image("a", 4), False),
        (noise_image("a", 4).convert("L"), False),
    ],
)
def test_examine__one_value_in_all_pixels(image: Image.Image, is_uniform: bool) -> None:
    assert examine(encoded(image, "PNG")).is_uniform is is_uniform


def test_examine__pixels_of_a_picture_that_was_saved_again() -> None:
    picture = noise_image("a", 8)
    forms = [encoded(picture, "PNG"), encoded(picture, "BMP"), encoded(picture, "PPM")]
    assert len({examine(content).pixel_hash for content in forms}) == 1
    others = [noise_image("b", 8), picture.resize((16, 4)), picture.transpose(Image.Transpose(0))]
    hashes = {examine(encoded(other, "PNG")).pixel_hash for other in others}
    assert len(hashes | {examine(forms[0]).pixel_hash}) == 4


# ---- EXIF


@pytest.mark.parametrize("entries", [(ORIENTATION,), (ORIENTATION, UNWRITABLE)])
def test_decode__is_turned_by_its_exif(entries: Any) -> None:
    # Pillow's own function writes the EXIF back, which fails for some that cameras write.
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))
    turned = decode(encoded(picture, "JPEG", exif=exif(*entries)))
    assert turned.size == (20, 40)
    assert np.asarray(turned)[:10].min() > 200 and np.asarray(turned)[30:].max() < 50


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_decode__damaged_exif_leaves_the_picture_as_it_is() -> None:
    content = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=b"Exif\0\0II*\0 nothing")
    assert decode(content).size == (40, 20)


# ---- which files are images


@pytest.mark.parametrize("form", ["PPM", "WEBP", "AVIF", "JPEG2000", "PCX", "SGI", "ICO", "BMP"])
def test_is_recognised__by_content(form: str) -> None:
    content = encoded(noise_image("a", 32), form)
    assert is_recognised(io.BytesIO(content))
    assert decode(content).size == (32, 32)


@pytest.mark.parametrize(
    "content",
    [b"", b"P1 is a patient", b"#define WIDTH 3", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"{}", bytes(99)],
)
def test_is_recognised__other_files(content: bytes) -> None:
    assert not is_recognised(io.BytesIO(content))


def test_decode__starts_no_other_program_for_postscript() -> None:
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UndecodableImageError, match="not recognised as an image"):
        decode(content)


def test_names_an_image() -> None:
    assert all(map(names_an_image, ("a.JPG", "a.ppm", "a.jfif", "a.avif", "a.tga")))
    assert not any(map(names_an_image, ("a.txt", "a", "a.heic", "a.eps", "a.h5", ".png")))


# ---- formats


def test_formats__pillow_is_called_in_one_place_with_a_list() -> None:
    package = Path(pixels.__file__).parents[1]
    calls = {
        path: [ast.unparse(c) for c in ast.walk(ast.parse(text)) if isinstance(c, ast.Call)]
        for path in package.rglob("*.py")
        if "Image.open(" in (text := path.read_text())
    }
    found = [(p, c) for p, all_calls in calls.items() for c in all_calls if "Image.open" in c]
    assert found == [(Path(pixels.__file__), "Image.open(file, formats=formats)")]
    assert not {"EPS", "WMF", "MPEG", "GRIB", "BUFR", "HDF5", "FITS", "PDF"} & set(pixels.FORMATS)
    Image.init()
    assert set(pixels.FORMATS) <= set(Image.OPEN)


EXAMINED_AT_ONCE = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from drtune_ray.data.pixels import examine
content = Path(sys.argv[1]).read_bytes()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before = peak()
with ThreadPoolExecutor(8) as pool:
    all_facts = pool.map(examine, [content] * int(sys.argv[2]))
    (found,) = {facts.pixel_hash for facts in all_facts}
print(found, peak() - before)
"""


def test_examine__large_images_at_once_take_the_memory_of_one(tmp_path: Path) -> None:
    """Eight of 24 megapixels; each takes up to 20 bytes a pixel while it is decoded."""
    image = Image.new("RGBA", (6000, 4000), (200, 100, 50, 255))
    image.paste((10, 20, 30, 100), (1000, 1500, 4000, 3500))
    image.save(tmp_path / "large.png", compress_level=1)
    command = [sys.executable, "-c", EXAMINED_AT_ONCE, str(tmp_path / "large.png"), "8"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pixel_hash, mebibytes = output.split()
    assert float(mebibytes) < 2 * 20 * 24
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    whole = hashlib.blake2b(b"RGB (6000, 4000)" + flat.tobytes(), digest_size=16)
    assert pixel_hash == whole.hexdigest()  # though it is hashed in strips


def test_scan__an_image_that_pillow_warns_of_is_one_like_any_other(tmp_path: Path) -> None:
    image = Image.new("1", (10000, 9000))
    image.save(tmp_path / "wide.png")
    command = [sys.executable, "-c", EXAMINED_AT_ONCE, str(tmp_path / "wide.png"), "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_decode__a_large_image_in_a_forked_process(tmp_path: Path) -> None:
    """The thread for large images is the parent's alone."""
    content = encoded(Image.new("1", (5000, 4000), 1), "PNG")
    assert decode(content).size == (5000, 4000)
    process = multiprocessing.get_context("fork").Process(target=decode, args=(content,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, as meant
        process.start()
    process.join(60)
    is_done = process.exitcode == 0
    process.kill()
    assert is_done
