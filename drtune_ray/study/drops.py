"""Rates of stochastic depth and dropout that a search space holds, against its backbones."""

from __future__ import annotations

from drtune_ray.config.trial import TABLES_PATHS, TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.space.points import combinations, needed_for
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.study.inputs import StudyInputs
from drtune_ray.training.dropping import check_drops
from drtune_ray.values import flattened

PATHS = ("backbone.drop_path", "backbone.dropout")


def check_searched_drops(space: SearchSpace, base: TrialConfig, checked: StudyInputs) -> None:
    """Check that each backbone of a space has what the space searches in it.

    Args:
        space: Search space, clamped to the images.
        base: The configuration that the space varies.
        checked: Inputs with the encoders of all trials.

    Raises:
        ConfigError: Naming every backbone that lacks something.
    """
    if not any(parameter.path in PATHS for parameter in space.parameters):
        return
    wanted = (*PATHS, *TABLES_PATHS)
    known: dict[tuple[str, bool, bool], list[str]] = {}
    values = flattened(base.to_mapping()) | dict(space.facts)
    for point in combinations(needed_for(space.parameters, wanted), values):
        taken = {path: value for path, value in point.taken.items() if path in wanted}
        config = base.with_values(taken)
        rates = config.backbone.drop_path > 0, config.backbone.dropout > 0
        key = (config.backbone.name, *rates)
        if key not in known:
            known[key] = check_drops(config.backbone, checked.encoder_of(config))
    if problems := list(dict.fromkeys(text for texts in known.values() for text in texts)):
        raise ConfigError(problems)
