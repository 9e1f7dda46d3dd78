"""Images that a command line names: files, folders, patterns, or a list on standard input."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from drtune_ray.data.pixels import names_an_image
from drtune_ray.errors import ConfigError

LIST = "-"


def image_files(arguments: Iterable[str], listing: TextIO) -> Iterator[str]:
    """Yield the paths of images.

    Args:
        arguments: Files, folders (with all images below them), patterns such as ``*.jpg`` that no
            shell has expanded, or ``-`` for the lines of `listing`.
        listing: Paths, one a line.

    Raises:
        ConfigError: If a folder or a pattern holds no image.
    """
    for argument in arguments:
        if argument == LIST:
            yield from filter(None, (line.rstrip("\r\n") for line in listing))
        elif os.path.isdir(argument):
            yield from _below(argument)
        elif glob.has_magic(argument) and not os.path.exists(argument):
            yield from _matching(argument)
        else:
            yield argument


def _below(folder: str) -> Iterator[str]:
    is_empty = True
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if names_an_image(name) and not name.startswith("."):
                is_empty = False
                yield str(Path(parent, name))
    if is_empty:
        raise ConfigError(f"there is no image in the folder {folder!r}: give one with images")


def _matching(pattern: str) -> Iterator[str]:
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise ConfigError(f"no file matches {pattern!r}: correct the pattern")
    yield from found
