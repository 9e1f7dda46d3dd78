"""Encoded pictures, for tests."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ORIENTATION = (0x0112, 3, 1, struct.pack("<HH", 6, 0))  # turned by 90 degrees
# A tag of a type that Pillow reads but cannot write.
UNWRITABLE = (0x0101, 8, 1, struct.pack("<hh", -3, 0))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF with entries of tag, type, number and value."""
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    header = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return header + directory + bytes(4)


def twelve_bit_tiff(first: int, second: int) -> bytes:
    """A TIFF of two pixels of 12 bits each, which Pillow cannot write."""
    pixels = bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 12) + pixels + b"\0" + directory


def sixteen_bit_colours(values: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits a channel of values (H, W, 3), which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    signature = b"\x89PNG\r\n\x1a\n"
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return signature + b"".join(chunk(*each) for each in chunks)
