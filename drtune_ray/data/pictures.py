"""Facts about pictures that a check of a source reports, and thumbnails."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import imagehash
import numpy as np
from numpy.typing import NDArray

from drtune_ray.data.pixels import UndecodableImageError, decode, header

THUMBNAIL = (96, 96)
BLOCK = 1024  # rows of perceptual hashes that are compared at once


@dataclass(frozen=True)
class PictureFacts:
    """Facts about a picture.

    Attributes:
        width: Width in pixels, as stored.
        height: Height in pixels, as stored.
        mode: Pillow's mode, such as ``RGB``.
        form: Format, such as ``JPEG``.
        is_turned: Whether its EXIF orientation turns or mirrors it.
        num_frames: Number of frames; the first one is used.
        perceptual_hash: 64 bits that similar pictures share.
    """

    width: int
    height: int
    mode: str
    form: str
    is_turned: bool
    num_frames: int
    perceptual_hash: int


def picture_facts(content: bytes) -> PictureFacts:
    """Return the facts about an encoded picture.

    Raises:
        UndecodableImageError: If it cannot be decoded.
    """
    found = header(content)
    bits = int(str(imagehash.phash(decode(content))), 16)
    return PictureFacts(*found, perceptual_hash=bits)


def similar_pairs(hashes: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """Return the pairs of rows (pairs, 2) whose hashes differ in at most `distance` bits."""
    found = [np.empty((0, 2), np.int64)]
    for start in range(0, len(hashes), BLOCK):
        differing = np.bitwise_count(hashes[start : start + BLOCK, None] ^ hashes[None, start:])
        first, second = np.nonzero(differing <= distance)
        pairs = np.stack([first, second], 1)[first < second] + start
        found.append(pairs)
    return np.concatenate(found)


def thumbnail(content: bytes) -> str:
    """Return a small JPEG of a picture as a data URI; empty if it cannot be decoded."""
    try:
        image = decode(content)
    except UndecodableImageError:
        return ""
    image.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
