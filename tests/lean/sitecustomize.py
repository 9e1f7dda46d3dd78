"""A machine with torch, timm, pyarrow, pydantic and pytest alone, for processes that find this
folder on PYTHONPATH: other packages of the project are there, but cannot be imported."""

from __future__ import annotations

import importlib.machinery
import sys
from typing import Any

MISSING = (
    "click",
    "hypothesis",
    "jsonpatch",
    "mlflow",
    "optuna",
    "psycopg",
    "pytest_timeout",
    "ray",
    "rich",
    "xdist",
)


class _LeanFinder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in MISSING:
            return None
        return super().find_spec(name, path, target)


sys.meta_path[:] = [
    _LeanFinder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
]
