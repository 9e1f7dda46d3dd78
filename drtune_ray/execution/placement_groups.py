"""What a trial of several workers may leave behind when it is stopped, and its end.

Ray Train's workers hold their resources in a placement group that belongs to the controller of
their trial. Tune stops a trial by killing its processes, the controller among them, and the group
remains. A detached actor of Ray Train's removes it, but it asks Ray's dashboard whether the
controller lives, and it never hears of a group that was still waiting for resources: that one takes
them as soon as they are free, for nobody. Ray's own table says of each group whether its creator
is dead; the driver of the study removes those.
"""

from __future__ import annotations

from collections.abc import Iterator

from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_nodes

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.ray_state import (
    BY_DRIVER,
    forget_job,
    has_no_living_creator,
    own_cluster,
    own_job,
    placement_groups,
    registered_ended_jobs,
)

STATE_API_SECONDS = 10


def remove_orphans() -> int:
    """Remove this job's placement groups whose creating actor is dead; returns their number."""
    orphans = list(_orphans())
    for group in orphans:
        remove_placement_group(group)
    return len(orphans)


def remove_leftovers() -> int:
    """Remove the placement groups of our jobs that have ended; returns their number.

    One that was asked for while its job was ending comes behind Ray's own cleaning and stays for
    ever (2.60): it waits for resources and takes them when they are free. Other users' jobs are
    not looked at: theirs may live on in a detached actor that made the group.
    """
    ours = registered_ended_jobs()
    leftovers = [
        PlacementGroup(PlacementGroupID(group.placement_group_id))
        for group in placement_groups()
        if group.creator_job_id.hex() in ours
        and not group.is_detached
        and has_no_living_creator(group)
    ]
    for left in leftovers:
        remove_placement_group(left)
    if not leftovers:
        for job in ours:
            forget_job(job)
    return len(leftovers)


def check_state_api() -> None:
    """Ray Train's actors that outlive a trial end themselves only where the dashboard answers.

    Raises:
        EnvironmentProblem: If the cluster's does not.
    """
    try:
        with own_cluster():
            list_nodes(limit=1, timeout=STATE_API_SECONDS)
    except Exception as error:  # its client has many ways to say so
        raise EnvironmentProblem(
            "trainings of several workers need the dashboard of the Ray cluster, which does not "
            "answer: without it each one that is stopped early leaves a process on the head node. "
            "Install ray[default] there and start it with --include-dashboard=true "
            f"({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
        ) from None


def _orphans() -> Iterator[PlacementGroup]:
    for group in placement_groups():
        if (
            group.creator_job_id.hex() == own_job()
            and group.creator_actor_id not in BY_DRIVER
            and group.creator_actor_dead
            and not group.is_detached
        ):
            yield PlacementGroup(PlacementGroupID(group.placement_group_id))
