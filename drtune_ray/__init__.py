"""Finds the best DR-Tune fine-tuning of a pretrained vision model for your images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drtune_ray.config import StudyConfig, TrialConfig
    from drtune_ray.method import DRTune
    from drtune_ray.study import run_study

__all__ = ["DRTune", "StudyConfig", "TrialConfig", "run_study"]
__version__ = "0.1.0"

# Imported when first asked for: `import drtune_ray` must load neither torch nor ray.
_HOMES = {
    "DRTune": "drtune_ray.method",
    "StudyConfig": "drtune_ray.config",
    "TrialConfig": "drtune_ray.config",
    "run_study": "drtune_ray.study",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
