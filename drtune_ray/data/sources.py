"""Scan a folder of class folders into one Arrow table of files and labels."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from drtune_ray.errors import ConfigError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
NUM_PROBLEMS_SHOWN = 5

FILE_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.int32()),
        ("content_hash", pa.string()),
        ("num_bytes", pa.int64()),
        ("modified_ns", pa.int64()),
    ]
)


@dataclass(frozen=True)
class ImageFolder:
    """A scanned source.

    Attributes:
        root: The folder.
        classes: Class names in the order of the labels.
        files: Table of `FILE_SCHEMA`, paths relative to the root; sorted by path.
    """

    root: Path
    classes: tuple[str, ...]
    files: pa.Table


def scan_class_folders(root: Path, known: pa.Table | None = None) -> ImageFolder:
    """List, hash and decode every image of a folder of class folders.

    Args:
        root: Folder with one folder per class, whose images may be nested.
        known: An earlier scan; files of the same path, size and time are not read again.

    Raises:
        ConfigError: If the folder is missing or empty, has fewer than two classes or an empty
            class, or holds images that cannot be decoded; all problems are named together.
    """
    if not root.is_dir():
        raise ConfigError(
            f"data.train={str(root)!r} is not a folder: give a folder of class folders"
        )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    paths = {folder.name: sorted(_images(folder)) for folder in folders}
    problems = [
        f"class folder {name!r} in {root} holds no image: add some or remove the folder "
        f"(images end in {', '.join(sorted(IMAGE_SUFFIXES))})"
        for name, found in paths.items()
        if not found
    ]
    if len(folders) < 2:
        problems.insert(
            0,
            f"at least 2 class folders must be in data.train, but {root} holds {len(folders)}"
            + (f" ({folders[0].name!r})" if folders else "")
            + ": put the images of each class into a folder named after the class",
        )
    if problems:
        raise ConfigError(problems)
    work = [(path, label) for label, found in enumerate(paths.values()) for path in found]
    return ImageFolder(root, tuple(paths), _read_files(root, work, known))


def read_bytes(root: Path, row: dict[str, object]) -> bytes:
    """Read the encoded image of a row of the table.

    Raises:
        ConfigError: If the file is missing or changed since the scan.
    """
    path = root / str(row["path"])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; restore the file") from None
    if content_hash(content) != row["content_hash"]:
        raise ConfigError(f"{path} changed since the study started: restore the original file")
    return content


def decode(content: bytes) -> Image.Image:
    """Decode an RGB image: rotated by its EXIF orientation, transparency on white."""
    image: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def content_hash(content: bytes) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _images(folder: Path) -> Iterator[Path]:
    return (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and not path.is_dir()
    )


def _read_files(root: Path, work: list[tuple[Path, int]], known: pa.Table | None) -> pa.Table:
    earlier = {} if known is None else {row["path"]: row for row in known.to_pylist()}

    def read(item: tuple[Path, int]) -> dict[str, object] | str:
        path, label = item
        try:
            status = path.stat()
        except OSError as error:
            return f"{path} cannot be read ({error.strerror}): replace or remove it"
        row: dict[str, object] = {
            "path": path.relative_to(root).as_posix(),
            "label": label,
            "num_bytes": status.st_size,
            "modified_ns": status.st_mtime_ns,
        }
        before = earlier.get(row["path"])
        if before and all(before[key] == row[key] for key in ("num_bytes", "modified_ns")):
            return row | {"content_hash": before["content_hash"]}
        content = path.read_bytes()
        try:
            decode(content)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{path} cannot be decoded as an image ({error}): replace or remove it"
        return row | {"content_hash": content_hash(content)}

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, work))
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        more = len(problems) - NUM_PROBLEMS_SHOWN
        raise ConfigError(
            problems[:NUM_PROBLEMS_SHOWN] + ([f"and {more} more such files"] if more > 0 else [])
        )
    return pa.Table.from_pylist(results, schema=FILE_SCHEMA)
