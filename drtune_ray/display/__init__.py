"""Output for people and programs while a study or training runs, and at its end."""

from __future__ import annotations

from drtune_ray.display.text import duration, percent

__all__ = ["duration", "percent"]
