"""Ray's job server, as a user meets it: bounded waits, and one message where it fails."""

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
# Ray's client prefers these to the address that it is given.
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
USED_ID = "already exists"


class UsedId(Exception):
    """A submission id was used before."""


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which else would wait for ever."""

    def _do_request(self, *args: Any, **options: Any) -> Any:
        options.setdefault("timeout", (ANSWER_SECONDS, REQUEST_SECONDS))
        return super()._do_request(*args, **options)


class JobServer:
    """A cluster's job server, reached and willing.

    Args:
        address: That was checked.

    Raises:
        EnvironmentProblem: If it does not answer or does not take the token.
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
        """Whether everybody who reaches it over a network may run code there."""
        return self._token is None and not is_loopback(urlsplit(self.address).hostname or "")

    def attempts(self) -> list[Attempt]:
        """The jobs of all studies that were submitted there."""
        with self._as_problem():
            return [a for a in map(attempt_of, self._client.list_jobs()) if a is not None]

    def attempt(self, submission_id: str) -> Attempt:
        """How an attempt stands now."""
        with self._as_problem():
            found = attempt_of(self._client.get_job_info(submission_id))
        assert found is not None  # it was one before
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
            number: Of the attempt.
            command: What the job runs, beside the study file.
            resources: For it.
            arguments: Of the command that submits.

        Raises:
            UsedId: If there is an attempt of this number.
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
        """Have Ray send SIGTERM to an attempt, and kill it three seconds later."""
        with self._as_problem():
            self._client.stop_job(submission_id)

    def log(self, submission_id: str) -> str:
        """All that an attempt has printed."""
        with self._as_problem():
            text: str = self._client.get_job_logs(submission_id)
        return text

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        """Pieces of what an attempt has printed, from the beginning, until it is over."""
        with self._as_problem():
            async for text in self._client.tail_job_logs(submission_id):
                yield text

    @contextmanager
    def _as_problem(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError:
            raise EnvironmentProblem(self._refusal()) from None
        except RuntimeError as error:  # what Ray's client makes of the server's answers
            if USED_ID in str(error):
                raise UsedId from None
            raise EnvironmentProblem(
                f"{self.address} did not do what it was asked: {_last_line(error)}"
            ) from None
        except (OSError, aiohttp.ClientError) as error:
            raise EnvironmentProblem(unreachable(self.address, error)) from None

    def _refusal(self) -> str:
        if self._token is None:
            return f"{self.address} asks for a token now: repeat the command"
        return (
            f"{self.address} does not take the token of {self._token.source}: give the one that "
            "the cluster was started with"
        )


def _quieten_ray() -> None:
    """Ray's client tells of every upload and connection, on loggers of its own levels."""
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(max(handler.level, logging.WARNING))


def _last_line(error: Exception) -> str:
    """Ray's server answers with tracebacks; their last line says it."""
    lines = str(error).strip().splitlines()
    return lines[-1].rstrip(". ") if lines else type(error).__name__
