"""All that is checked of a set of manifests."""

from __future__ import annotations

from collections.abc import Iterator

from tests.deploy.manifests import Object
from tests.deploy.rules_kuberay import kuberay_problems
from tests.deploy.rules_network import network_problems
from tests.deploy.rules_overlays import overlay_problems
from tests.deploy.rules_pods import pod_problems
from tests.deploy.rules_references import reference_problems
from tests.deploy.rules_security import security_problems
from tests.deploy.rules_servers import server_problems
from tests.deploy.rules_versions import version_problems

RULES = (
    kuberay_problems,
    security_problems,
    pod_problems,
    reference_problems,
    server_problems,
    version_problems,
)


def rule_problems(objects: tuple[Object, ...], overlay: str) -> Iterator[str]:
    """What the schemas do not hold."""
    for rule in RULES:
        yield from rule(objects)
    yield from overlay_problems(objects, overlay)
    yield from network_problems(objects, overlay)
