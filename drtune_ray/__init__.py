"""Finds the best DR-Tune fine-tuning of a pretrained vision model for your images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drtune_ray.config import StudyConfig, TrialConfig
    from drtune_ray.display.script import run_study
    from drtune_ray.method import DRTune
    from drtune_ray.results.predict import load

__all__ = ["DRTune", "StudyConfig", "TrialConfig", "load", "run_study"]
__version__ = "0.1.0"

# Imported when first asked for: `import drtune_ray` must load neither torch nor ray.
_HOMES = {
    "DRTune": "drtune_ray.method",
    "StudyConfig": "drtune_ray.config",
    "TrialConfig": "drtune_ray.config",
    "load": "drtune_ray.results.predict",
    "run_study": "drtune_ray.display.script",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
