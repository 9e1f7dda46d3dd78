"""One trial on one process group; knows nothing of studies, Tune or MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drtune_ray.training.loop import train_epochs

__all__ = ["train_epochs"]


def __getattr__(name: str) -> Any:
    # A driver imports the reports without torch.
    if name == "train_epochs":
        from drtune_ray.training.loop import train_epochs

        return train_epochs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
