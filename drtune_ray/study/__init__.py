"""Studies and trainings, from the request to the winner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drtune_ray.study.run import run_study

__all__ = ["run_study"]


def __getattr__(name: str) -> Any:
    # Reading a search space must not import ray.
    if name == "run_study":
        from drtune_ray.study.run import run_study

        return run_study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
