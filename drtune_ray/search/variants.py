"""The kinds of prepared tables that the trials of a study read."""

from __future__ import annotations

from drtune_ray.config.trial import TABLES_PATHS, TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.space.corners import corners, needed_for, thresholds_in
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.values import flattened

MAX_VARIANTS = 16


def table_variants(space: SearchSpace, base: TrialConfig) -> tuple[TrialConfig, ...]:
    """One configuration for each kind of tables, the base's first.

    Args:
        space: On images that were read.
        base: The configuration that the space varies.

    Raises:
        ConfigError: If there are too many to prepare.
    """
    found = {base.tables_key: base}
    needed = needed_for(space.parameters, TABLES_PATHS)
    expressions = [e for p in needed for e in (p.expression, p.when.expression) if e is not None]
    cuts = thresholds_in(expressions, [p.when for p in needed], space.facts)
    for point in corners(needed, flattened(base.to_mapping()) | dict(space.facts), cuts):
        config = base.with_values(
            {path: value for path, value in point.taken.items() if path in TABLES_PATHS}
        )
        found.setdefault(config.tables_key, config)
        if len(found) > MAX_VARIANTS:
            raise ConfigError(
                f"the search space asks for more than {MAX_VARIANTS} kinds of prepared images and "
                "features, each of which is computed before the first trial: give "
                f"{[p.path for p in needed]} fewer values"
            )
    return tuple(found.values())
