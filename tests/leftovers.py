"""What a study of several workers may leave on a Ray cluster that this process has joined."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from pathlib import Path

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


def memory_mib() -> dict[str, int]:
    """Resident memory of this process and of Ray's own two below it."""
    found = {"driver": _resident_mib(Path("/proc/self"))}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = Path((entry / "cmdline").read_bytes().split(b"\0")[0].decode()).name
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if name in ("gcs_server", "raylet") and int(parent) == os.getpid():
                found[name] = _resident_mib(entry)
    return found


def _resident_mib(process: Path) -> int:
    return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20


def assert_cluster_is_empty(seconds: float = 20.0) -> None:
    """Nobody holds anything any more."""
    deadline = time.monotonic() + seconds
    while (live_groups() or live_actors()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (live_groups(), live_actors()) == (Counter(), Counter())


def free_port() -> int:
    """For a dashboard: two clusters of one machine cannot have the same."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
