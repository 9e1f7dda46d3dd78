"""Checks of a pt2 file before PyTorch reads it: a graph of ATen operators, and nothing else.

PyTorch looks operators up by dotted names and evaluates the expressions of varying sizes as
Python: a planted file could name anything there.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drtune_ray.errors import EnvironmentProblem

OPERATOR = re.compile(r"torch\.ops\.aten\.\w+(\.\w+)?|_operator\.\w+", re.ASCII)
# Of sizes, as SymPy writes them: Mul(Integer(49), Symbol('s31', positive=True, integer=True)).
NAME = (
    r"(?:Symbol|Integer|Rational|Add|Mul|Pow|Mod|Max|Min|FloorDiv|CleanDiv|PythonMod"
    r"|positive|integer|nonnegative|True|False|[su]\d+)"
)
EXPRESSION = re.compile(rf"(?:{NAME}(?!\w)|(?<!\w)\d+(?!\w)|[ +\-*/%(),='])*", re.ASCII)
GRAPH = re.compile(r"[^/]+/models/model\.json")
ALLOWED = {"target": OPERATOR, "expr_str": EXPRESSION}


def check_pt2(path: Path) -> None:
    """Refuse a file that holds more than an exported model.

    Raises:
        EnvironmentProblem: Naming what it holds.
        zipfile.BadZipFile: If it is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        graphs = [name for name in archive.namelist() if "/models/" in name]
        if len(graphs) != 1 or not GRAPH.fullmatch(graphs[0]):
            raise EnvironmentProblem(f"{path} holds other programs than one graph: {graphs}")
        content = json.loads(archive.read(graphs[0]))
    for key, text in _texts(content):
        if key in ALLOWED and not ALLOWED[key].fullmatch(text):
            raise EnvironmentProblem(
                f"{path} holds more than an exported model ({key} {text[:80]!r}): it is not "
                "loaded; export the model again"
            )


def _texts(content: Any) -> Iterator[tuple[str, str]]:
    """Yield each text below a value, with its key."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            yield from ((key, text) for key, text in value.items() if isinstance(text, str))
            waiting += value.values()
