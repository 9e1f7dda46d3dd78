"""The folder of images: whether it is one, and whether its names can be recorded."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from drtune_ray.errors import ConfigError
from drtune_ray.values import printable


def check_root(root: Path) -> None:
    """Check that the root is a folder.

    Raises:
        ConfigError: If not, or if its name cannot be recorded.
    """
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_folder = False
    except OSError as error:
        raise ConfigError(
            f"data.train={str(root)!r} cannot be read ({error.strerror}): give a folder of class "
            "folders that you may read"
        ) from None
    if not is_folder:
        raise ConfigError(
            f"data.train={str(root)!r} is not a folder: give a folder of class folders"
        )
    if problems := [*name_problems([root])]:
        raise ConfigError(problems)


def name_problems(paths: Iterable[Path]) -> Iterator[str]:
    """Yield a sentence for each path whose name is not UTF-8, or cannot be in this locale."""
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            yield _name_problem(path)


def _name_problem(path: Path) -> str:
    encoding = sys.getfilesystemencoding()
    try:
        os.fsencode(path).decode()
    except UnicodeError:
        return f"the name of {printable(path)} is not UTF-8: rename it"
    return (
        f"the name of {printable(path)} cannot be read in this locale, whose encoding is "
        f"{encoding}: set PYTHONUTF8=1"
    )
