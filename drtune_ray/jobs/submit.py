"""Start a study on a cluster, unless it is running already."""

from __future__ import annotations

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.jobs.attempts import Attempt
from drtune_ray.jobs.server import JobServer, UsedId
from drtune_ray.jobs.submission import EntrypointResources, Submission

MAX_RACES = 3  # lost to other submissions of the same study at the same time


def submit(
    server: JobServer,
    submission: Submission,
    command: str,
    resources: EntrypointResources,
    arguments: tuple[str, ...],
) -> tuple[Attempt, bool]:
    """Return the attempt that runs a study, and whether this call started it.

    A pending or running attempt is returned as it is; otherwise the next attempt is started.

    Args:
        server: Job server of the cluster.
        submission: The study.
        command: Command that the job runs.
        resources: Resources of the command.
        arguments: Arguments of the command that submits.

    Raises:
        EnvironmentProblem: If the cluster does not accept the job.
    """
    for _ in range(MAX_RACES):
        former = [
            attempt
            for attempt in server.attempts()
            if (attempt.study, attempt.storage) == (submission.study, submission.storage)
        ]
        for attempt in former:
            if not attempt.is_over:
                return attempt, False
        number = max((attempt.number for attempt in former), default=0) + 1
        try:
            return server.start(submission, number, command, resources, arguments), True
        except UsedId:
            continue
    raise EnvironmentProblem(
        f"{server.address} has a job {submission.submission_id(number)} that is not an attempt of "
        "this study: delete it (`ray job delete`), or give the study another --name"
    )
