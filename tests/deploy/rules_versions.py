"""One version of each thing, wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from tests.deploy.manifests import ROOT, Object, cluster_spec


@cache
def constrained(package: str) -> str:
    """The version that constraints.txt holds."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (version,) = [line.split("==")[1] for line in lines if line.split("==")[0] == package]
    return version


def version_problems(objects: tuple[Object, ...]) -> Iterator[str]:
    for one in objects:
        cluster = cluster_spec(one)
        if cluster and cluster.get("rayVersion") != constrained("ray"):
            yield f"{one['kind']}: rayVersion {cluster.get('rayVersion')}"
