"""The place of the images: whether it exists, and whether its names can be recorded."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from drtune_ray.errors import ConfigError, first_line
from drtune_ray.values import printable


def check_place(root: Path) -> None:
    """Check that a source of this machine is a folder or a file.

    Raises:
        ConfigError: If not, or if its name cannot be recorded.
    """
    try:
        mode = root.stat().st_mode
        is_there = stat.S_ISDIR(mode) or stat.S_ISREG(mode)
    except (FileNotFoundError, NotADirectoryError):
        is_there = False
    except OSError as error:
        raise unreadable_place(root, error) from None
    if not is_there:
        raise ConfigError(
            f"data.train={str(root)!r} is neither a folder nor a file: give a folder of class "
            "folders, or another source of docs/images.md (datasets of a hub are not fetched: save "
            "them with save_to_disk)"
        )
    if problems := [*name_problems([root])]:
        raise ConfigError(problems)


def unreadable_place(root: Path, error: OSError) -> ConfigError:
    """Return the refusal of a source that cannot be read."""
    why = error.strerror or first_line(error)
    return ConfigError(
        f"data.train={str(root)!r} cannot be read ({why}): give images that you may read"
    )


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
