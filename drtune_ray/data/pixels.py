"""Decode encoded images to RGB, those with more than 8 bits a channel included.

What a value means is not in the file: 4095 may be white or nearly black. The largest value of all
images of a source decides (`white_values`), so that images keep their brightness relative to each
other.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import PurePath
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

# The only formats that are decoded. Pillow chooses by content, whatever the suffix, and knows
# formats that start programs (EPS: Ghostscript) or need other decoders: none of them is here.
FORMATS = (
    "AVIF",
    "BMP",
    "DDS",
    "DIB",
    "GIF",
    "ICNS",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PCX",
    "PNG",
    "PPM",
    "PSD",
    "QOI",
    "SGI",
    "SUN",
    "TGA",
    "TIFF",
    "WEBP",
    "XBM",
    "XPM",
)
WITHOUT_SIGNATURE = "TGA"  # a file is one by its name alone
# Formats whose values Pillow scales to 16 bits.
SCALED_FORMATS = frozenset({"JPEG2000", "PPM"})
SIXTEEN_BITS = 2**16 - 1
WHITES = (1, 2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, SIXTEEN_BITS)
# Largest value of floating-point images that is neither clearly of 0 to 1 nor of 0 to 255.
UNCLEAR_PEAK = 16
BITS_PER_SAMPLE = 258  # tag of TIFF
# Pillow refuses twice as many pixels as it warns of; what lies between is an image like any other.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Decoding takes up to 20 bytes a pixel: threads that decode such images at once fill the memory.
LARGE_PIXELS = 2**24
Made = TypeVar("Made")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
OPAQUE_FIRST = {"RGBa": "RGBA", "La": "LA"}


class UndecodableImageError(ValueError):
    """An image that Pillow cannot decode, or whose values have no known brightness."""


@dataclass(frozen=True)
class PixelFacts:
    """Facts about the pixels of an image.

    Attributes:
        integer_peak: Largest value of an image of 16 or 32-bit integers; None for others.
        float_peak: Largest value of a floating-point image; None for others.
        is_uniform: Whether all pixels are equal.
        pixel_hash: Hash of the decoded pixels, the same for a picture that was saved again.
    """

    integer_peak: float | None
    float_peak: float | None
    is_uniform: bool
    pixel_hash: str


@dataclass(frozen=True)
class WhiteValues:
    """Values that become white, in images of 16 or 32-bit integers and of floats."""

    integer: int = SIXTEEN_BITS
    floating: int = 2**8 - 1


DEFAULT_WHITES = WhiteValues()


def white_values(
    integer_peaks: Iterable[float | None], float_peaks: Iterable[float | None]
) -> WhiteValues:
    """Return the white values of a source: the smallest range that holds all its values."""
    integers = [peak for peak in integer_peaks if peak is not None]
    floats = [peak for peak in float_peaks if peak is not None]
    return WhiteValues(
        _white(max(integers)) if integers else DEFAULT_WHITES.integer,
        _white(max(floats)) if floats else DEFAULT_WHITES.floating,
    )


def decode(content: bytes, whites: WhiteValues = DEFAULT_WHITES) -> Image.Image:
    """Decode an RGB image: rotated by its EXIF orientation, transparency on white.

    Raises:
        UndecodableImageError: If Pillow cannot decode it.
    """
    return _one_if_large(lambda: _rgb(_upright(content), whites), content)


def rgb_of(image: Image.Image, whites: WhiteValues = DEFAULT_WHITES) -> Image.Image:
    """Return an opened image as `decode` returns that of a file.

    Raises:
        UndecodableImageError: If it cannot be converted.
    """
    try:
        method = UPRIGHT.get(_orientation(image))
        return _rgb(image if method is None else image.transpose(method), whites)
    except Exception as error:  # a file that Pillow reads only now
        raise UndecodableImageError(str(error) or type(error).__name__) from error


def examine(content: bytes) -> PixelFacts:
    """Decode an image and return the facts about its pixels.

    Raises:
        UndecodableImageError: If Pillow cannot decode it, or its values have no known brightness.
    """
    return _one_if_large(lambda: _facts(content), content)


def _facts(content: bytes) -> PixelFacts:
    image = _upright(content)
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_facts(image, content)
    image = _rgb(image, DEFAULT_WHITES)
    is_uniform = all(low == high for low, high in _extrema(image))
    return PixelFacts(None, None, is_uniform, _pixel_hash(image))


def header(content: bytes) -> tuple[int, int, str, str, bool, int]:
    """Return width, height, mode, format, whether EXIF turns it, and frames, without decoding.

    Raises:
        UndecodableImageError: If Pillow cannot read it.
    """
    try:
        image = _opened(io.BytesIO(content))
        num_frames = int(getattr(image, "n_frames", 1))
        form, is_turned = image.format or "", _orientation(image) in UPRIGHT
        return image.width, image.height, image.mode, form, is_turned, num_frames
    except Exception as error:  # plugins raise errors of many types at damaged files
        raise UndecodableImageError(str(error) or type(error).__name__) from error


def as_eight_bits(content: bytes, whites: WhiteValues) -> bytes:
    """Return an image as a PNG of 8 bits a channel."""
    buffer = io.BytesIO()
    decode(content, whites).save(buffer, "PNG")
    return buffer.getvalue()


def names_an_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image format that Pillow decodes."""
    return _format_by_suffix().get(PurePath(name).suffix.lower()) in FORMATS


def is_recognised(file: BinaryIO) -> bool:
    """Return whether Pillow recognises the content of a file as an image, by its signature."""
    try:
        _opened(file, tuple(name for name in FORMATS if name != WITHOUT_SIGNATURE))
    except Image.DecompressionBombError:
        return True
    except Exception:  # whatever a plugin raises at a file that is no image
        return False
    return True


@cache
def _format_by_suffix() -> dict[str, str]:
    Image.init()
    return dict(Image.EXTENSION)


def _opened(file: BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image: the one place that calls Pillow's `open`."""
    return Image.open(file, formats=formats)


def _one_if_large(make: Callable[[], Made], content: bytes) -> Made:
    """Call a function that decodes an image; for large ones in one thread, one after another."""
    try:
        width, height = _opened(io.BytesIO(content)).size
    except Exception:  # whatever it is, the function says why the image cannot be decoded
        return make()
    return _large_images().submit(make).result() if width * height > LARGE_PIXELS else make()


@cache
def _large_images() -> ThreadPoolExecutor:
    """Return the thread for large images: a lock would leave each thread with memory of its own."""
    return ThreadPoolExecutor(1, "large-image")


os.register_at_fork(after_in_child=_large_images.cache_clear)  # the child lacks the thread


def _upright(content: bytes) -> Image.Image:
    """Decode an image and rotate it by its EXIF orientation."""
    try:
        image = _opened(io.BytesIO(content))
        is_cut = ";16" in str(getattr(image, "tile", "")) and image.mode[0] in "RL"
        image.load()
        method = UPRIGHT.get(_orientation(image))
        _check_cut(image, is_cut=is_cut)
        return image if method is None else image.transpose(method)
    except UndecodableImageError:
        raise
    except UnidentifiedImageError:
        raise UndecodableImageError("not recognised as an image") from None
    except Exception as error:  # plugins raise errors of many types at damaged files
        raise UndecodableImageError(str(error) or type(error).__name__) from error


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing about the orientation
        return 1


def _check_cut(image: Image.Image, *, is_cut: bool) -> None:
    """Refuse 16-bit colours of which Pillow, which keeps the upper 8 bits, leaves almost nothing.

    Raises:
        UndecodableImageError: If the colours take fewer than 12 of the 16 bits.
    """
    if not is_cut:
        return
    bands = _extrema(image)
    colours = bands[:-1] if image.mode.endswith(("A", "a")) else bands
    highest = max(high for _, high in colours)
    if highest < 2**4:
        raise UndecodableImageError(
            f"16-bit colours of at most {(highest + 1) * 2**8 - 1}, of which Pillow keeps the "
            "upper 8 bits: save it with 8 bits a channel"
        )


def _extrema(image: Image.Image) -> list[tuple[float, float]]:
    """Return the smallest and the largest value of each band of an image of several bands."""
    found: Any = image.getextrema()
    return list(found)


def _rgb(image: Image.Image, whites: WhiteValues) -> Image.Image:
    if image.mode == "F":
        image = _scaled(image, whites.floating)
    elif image.mode.startswith("I"):
        image = _scaled(image, whites.integer)
    if image.mode in OPAQUE_FIRST:
        image = image.convert(OPAQUE_FIRST[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, white: int) -> Image.Image:
    values: NDArray[Any] = np.asarray(image).clip(0, white)
    if white == SIXTEEN_BITS and values.dtype.kind in "iu":
        return Image.fromarray((values >> 8).astype(np.uint8))
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))


def _deep_facts(image: Image.Image, content: bytes) -> PixelFacts:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    # Comparisons with NaN are false.
    if not (0 <= low <= high <= SIXTEEN_BITS):
        raise UndecodableImageError(
            f"values from {low:g} to {high:g}, but only values from 0 to {SIXTEEN_BITS} have a "
            "known brightness"
        )
    facts = PixelFacts(None, None, low == high, _pixel_hash(image))
    if image.mode == "F":
        return replace(facts, float_peak=high)
    return replace(facts, integer_peak=max(high, _declared_peak(content)))


def _pixel_hash(image: Image.Image) -> str:
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
    num_rows = max(1, LARGE_PIXELS // 4 // image.width)
    for top in range(0, image.height, num_rows):  # no second copy of a large image
        box = 0, top, image.width, min(top + num_rows, image.height)
        part = image if image.height <= num_rows else image.crop(box)
        digest.update(part.tobytes())
    return digest.hexdigest()


def _declared_peak(content: bytes) -> float:
    """Return the largest value that the file itself declares for its pixels; 0 if it does not."""
    image = _opened(io.BytesIO(content))
    if image.format in SCALED_FORMATS:
        return SIXTEEN_BITS
    bits: Any = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
    return float(2 ** bits[0] - 1) if bits[0] < 16 else 0.0


def _white(peak: float) -> int:
    return next((white for white in WHITES if peak <= white), SIXTEEN_BITS)
