"""A client of Ray's job server with bounded waits and one clear message for each failure."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.environment import environment
from drtune_ray.jobs.address import is_loopback
from drtune_ray.jobs.attempts import Attempt, attempt_of
from drtune_ray.jobs.submission import STUDY_FILE, EntrypointResources, Submission
from drtune_ray.jobs.token import ANSWER_SECONDS, Token, certificates, needed_token, unreachable

REQUEST_SECONDS = 30.0
# Ray's client prefers this variable to the address that it is given.
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
USED_ID = "already exists"


class UsedId(Exception):
    """Raised if a submission id was used before."""


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with a timeout for each request; by default it waits forever."""

    def _do_request(self, *args: Any, **options: Any) -> Any:
        options.setdefault("timeout", (ANSWER_SECONDS, REQUEST_SECONDS))
        return super()._do_request(*args, **options)


class JobServer:
    """A connection to a cluster's job server.

    Args:
        address: Address from :func:`~drtune_ray.jobs.address.checked_address`.

    Raises:
        EnvironmentProblem: If the server does not answer or rejects the token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._token: Token | None = needed_token(address)
        _quieten_ray()
        headers = {"Authorization": f"Bearer {self._token.value}"} if self._token else {}
        with environment({ADDRESS_VARIABLE: address}), self._as_problem():
            self._client = _Client(address, headers=headers, verify=certificates() or True)

    @property
    def is_open(self) -> bool:
        """Whether anyone who can reach the server over a network may run code there."""
        return self._token is None and not is_loopback(urlsplit(self.address).hostname or "")

    def attempts(self) -> list[Attempt]:
        """Return the jobs of all studies that were submitted to the server."""
        with self._as_problem():
            return [a for a in map(attempt_of, self._client.list_jobs()) if a is not None]

    def attempt(self, submission_id: str) -> Attempt:
        """Return an attempt with its present state."""
        with self._as_problem():
            found = attempt_of(self._client.get_job_info(submission_id))
        assert found is not None  # its id came from an attempt
        return found

    def start(
        self,
        submission: Submission,
        number: int,
        command: str,
        resources: EntrypointResources,
        arguments: tuple[str, ...],
    ) -> Attempt:
        """Start an attempt.

        Args:
            submission: The study.
            number: Number of the attempt.
            command: Command that the job runs, in the folder of the study file.
            resources: Resources of the command.
            arguments: Arguments of the command that submits.

        Raises:
            UsedId: If an attempt of this number exists.
        """
        submission_id = submission.submission_id(number)
        with TemporaryDirectory(prefix="drtune-submit-") as folder, self._as_problem():
            (Path(folder) / STUDY_FILE).write_text(submission.content)
            self._client.submit_job(
                entrypoint=command,
                submission_id=submission_id,
                runtime_env={
                    "working_dir": folder,
                    "env_vars": dict(submission.variables.sent),
                },
                metadata=submission.metadata(number, arguments),
                entrypoint_num_cpus=resources.num_cpus,
                entrypoint_num_gpus=resources.num_gpus,
                entrypoint_memory=resources.memory,
                entrypoint_resources=dict(resources.custom) or None,
            )
        return self.attempt(submission_id)

    def stop(self, submission_id: str) -> None:
        """Let Ray send SIGTERM to an attempt, and SIGKILL three seconds later."""
        with self._as_problem():
            self._client.stop_job(submission_id)

    def log(self, submission_id: str) -> str:
        """Return all output of an attempt."""
        with self._as_problem():
            text: str = self._client.get_job_logs(submission_id)
        return text

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        """Yield the output of an attempt in pieces, from the beginning until it has ended."""
        with self._as_problem():
            async for text in self._client.tail_job_logs(submission_id):
                yield text

    @contextmanager
    def _as_problem(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError:
            raise EnvironmentProblem(self._refusal()) from None
        except RuntimeError as error:  # what Ray's client raises for errors of the server
            if USED_ID in str(error):
                raise UsedId from None
            raise EnvironmentProblem(
                f"{self.address} rejected the request: {_last_line(error)}"
            ) from None
        except (OSError, aiohttp.ClientError) as error:
            raise EnvironmentProblem(unreachable(self.address, error)) from None

    def _refusal(self) -> str:
        if self._token is None:
            return f"{self.address} now requires a token: repeat the command"
        return (
            f"{self.address} rejects the token from {self._token.source}: give the one that the "
            "cluster was started with"
        )


def _quieten_ray() -> None:
    """Silence the messages of Ray's client about every upload and connection."""
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(max(handler.level, logging.WARNING))


def _last_line(error: Exception) -> str:
    """Return the last line, which is the message when Ray's server answers with a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].rstrip(". ") if lines else type(error).__name__
