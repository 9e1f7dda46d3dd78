"""The plan of a comparison by cross-validation: a comparison for each fold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from drtune_ray.config.study import StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.study.comparison_plan import SUFFIX, Comparison, planned
from drtune_ray.values import full_path


@dataclass(frozen=True)
class FoldedComparison:
    """A comparison of methods by repeated cross-validation.

    Attributes:
        config: The study that all methods and folds share.
        folds: Number of folds K.
        repeats: Number of divisions into K folds.
        parts: Comparison of each fold.
    """

    config: StudyConfig
    folds: int
    repeats: int
    parts: tuple[Comparison, ...]

    @property
    def methods(self) -> dict[str, str]:
        """`method.name` by the method's name in the comparison."""
        return self.parts[0].methods

    @property
    def folder(self) -> Path:
        """Folder of the comparison; those of its folds lie beside it."""
        return full_path(self.config.storage) / f"{self.config.name}-{SUFFIX}"

    def to_mapping(self) -> dict[str, object]:
        """Return methods, folds and settings as plain values."""
        own = {"methods": self.methods, "folds": self.folds, "repeats": self.repeats}
        return own | {"study": self.config.to_mapping()}


def planned_folds(
    config: StudyConfig,
    methods: str,
    spaces: Iterable[str] = (),
    *,
    folds: int,
    repeats: int = 1,
    has_seeds: bool = True,
) -> FoldedComparison:
    """Plan a comparison by cross-validation.

    Args:
        config: As in `planned`.
        methods: As in `planned`.
        spaces: As in `planned`.
        folds: Number of folds K.
        repeats: Number of divisions into K folds, each with a random seed of its own.
        has_seeds: Whether the number of seeds of a fold was given; else it is 1.

    Raises:
        ConfigError: Naming every problem.
    """
    values = config.to_mapping()
    if config.trial.data.folds is not None:
        raise ConfigError("data.folds: --folds sets the folds of a comparison: leave it out")
    if not has_seeds:
        values["finalists"]["num_seeds"] = 1
    parts = []
    for repeat in range(repeats):
        for fold in range(folds):
            values["name"] = f"{config.name}-fold{repeat + 1}.{fold + 1}"
            values["trial"]["data"] |= {"folds": folds, "fold": fold, "fold_seed": repeat}
            parts.append(planned(StudyConfig.from_mapping(values), methods, spaces))
    return FoldedComparison(config, folds, repeats, tuple(parts))
