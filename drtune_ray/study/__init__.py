"""Which trial next, when to stop it, where it runs."""

from __future__ import annotations

from typing import Any

__all__ = ["run_study"]


def __getattr__(name: str) -> Any:
    # Reading a search space must not import ray.
    if name == "run_study":
        from drtune_ray.study.run import run_study

        return run_study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
