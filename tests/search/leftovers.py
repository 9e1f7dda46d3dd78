"""What a study of several workers may leave on a Ray cluster that this process has joined."""

from __future__ import annotations

import time
from collections import Counter

# Ray's own, one a cluster, whatever was run on it.
RAYS_OWN = ("_AutoscalingCoordinatorActor",)


def live_groups() -> Counter[str]:
    """States of the placement groups that were not removed."""
    from ray.util import placement_group_table

    states = (group["state"] for group in placement_group_table().values())
    return Counter(state for state in states if state != "REMOVED")


def live_actors() -> Counter[str]:
    """Classes of the actors that live, Ray's own apart."""
    import ray

    actors = ray._private.state.actors(actor_state_name="ALIVE").values()
    names = (actor["ActorClassName"] for actor in actors)
    return Counter(name for name in names if name not in RAYS_OWN)


def actor_pids(name: str) -> list[int]:
    """Processes of the living actors of a class whose name begins so."""
    import ray

    actors = ray._private.state.actors(actor_state_name="ALIVE").values()
    return sorted(a["Pid"] for a in actors if a["ActorClassName"].startswith(name))


def assert_cluster_is_empty(seconds: float = 20.0) -> None:
    """Nobody holds anything any more."""
    deadline = time.monotonic() + seconds
    while (live_groups() or live_actors()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (live_groups(), live_actors()) == (Counter(), Counter())
