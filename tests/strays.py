"""Modules that must not be imported, in a directory where commands run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

# Of the standard library, of what the command imports, of what workers and servers import.
NAMES = ("queue", "click", "timm", "torch", "mlflow", "flask", "uvicorn", "drtune_notes")


def plant(folder: Path, names: Iterable[str] = NAMES) -> Path:
    """Write the modules; whoever imports one fails."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.py").write_text("raise ImportError(f'{__file__} must not be imported')")
    return folder
