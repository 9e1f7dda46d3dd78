"""Settings of a trial and of a study: typed, frozen, unknown keys rejected."""

from drtune_ray.config.study import StudyConfig
from drtune_ray.config.trial import TrialConfig

__all__ = ["StudyConfig", "TrialConfig"]
