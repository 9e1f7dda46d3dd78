"""Removal of the placement groups that stopped trials of several workers leave.

Ray Train's workers hold their resources in a placement group that belongs to the controller of
their trial. Tune stops a trial by killing its processes, the controller among them, and the group
remains. A detached actor of Ray Train removes it, but asks Ray's dashboard whether the controller
lives, and is never informed of a group that still waits for resources: that group takes them as
soon as they are free, unused. Ray's own table tells whether the creator of a group is dead; the
study's driver removes those groups.
"""

from __future__ import annotations

from collections.abc import Iterator

from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_nodes

from drtune_ray.errors import EnvironmentProblem, first_line
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
    """Remove this job's placement groups whose creating actor is dead; return their number."""
    orphans = list(_orphans())
    for group in orphans:
        remove_placement_group(group)
    return len(orphans)


def remove_leftovers() -> int:
    """Remove the placement groups of our jobs that have ended; return their number.

    A group that was requested while its job was ending escapes Ray's own clean-up and stays for
    ever (Ray 2.60): it takes its resources when they are free. Groups of other users' jobs are left
    alone: a detached actor of theirs may still use them.
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
    """Check that the dashboard answers: without it, Ray Train's clean-up actors never end.

    Raises:
        EnvironmentProblem: If it does not answer.
    """
    try:
        with own_cluster():
            list_nodes(limit=1, timeout=STATE_API_SECONDS)
    except Exception as error:  # its client has many ways to say so
        raise EnvironmentProblem(
            "trainings of several workers need the dashboard of the Ray cluster, which does not "
            "answer: without it each one that is stopped early leaves a process on the head node. "
            "Install ray[default] there and start it with --include-dashboard=true "
            f"({first_line(error)})"
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
