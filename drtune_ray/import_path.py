"""Folders from which Python imports: the current directory is none of them.

A file there named like a module, such as ``queue.py`` or ``timm.py``, would be run in its place.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

ROOT = str(Path(__file__).parents[1])  # holds the package, in a checkout too


def leave_out_current_folder() -> None:
    """Take the current directory off the import path of this process and of those it starts.

    ``python -m`` puts it there, and so does an empty entry or ``.`` in ``PYTHONPATH``. Its full
    path in ``PYTHONPATH`` stays.
    """
    if named := os.environ.get("PYTHONPATH"):
        entries = [entry for entry in named.split(os.pathsep) if entry not in ("", os.curdir)]
        os.environ["PYTHONPATH"] = os.pathsep.join(entries)
    sys.path[:] = [path for path in sys.path if not _is_current(path)]


def own_paths() -> list[str]:
    """Return the import path of this process without what its Python brings along."""
    brought = tuple(
        os.path.join(prefix, "") for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)
    )
    return [path for path in sys.path if not _is_current(path) and not path.startswith(brought)]


def _is_current(path: str) -> bool:
    """Return whether a path is the current directory, and there for no other reason."""
    if path in ("", os.curdir):
        return True
    try:
        is_here = os.path.samefile(path, os.curdir)
    except OSError:  # one of them does not exist
        return False
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return is_here and path not in (ROOT, *named, *sysconfig.get_paths().values())
