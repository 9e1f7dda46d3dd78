"""Whether an MLflow server takes what a study sends it, asked as the recorder asks."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from drtune_ray.errors import EnvironmentProblem, first_line
from drtune_ray.server_uri import secrets_hidden, with_secrets
from drtune_ray.tracking.mlflow_recorder import quiet_mlflow

EXPERIMENT = "drtune-ray-doctor"
ARTIFACT = "probe.txt"
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True)
class Answer:
    """What a server answered first.

    Attributes:
        server_seconds: Its time, in whole seconds since 1970; None where it does not tell.
        asked, answered: This machine's time before and after.
    """

    server_seconds: float | None
    asked: float
    answered: float


class ServerProbe:
    """An MLflow server, or a store that MLflow opens itself.

    Args:
        uri: Tracking URI.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._run_id = ""

    def ask(self) -> Answer:
        """Ask whether the server lives: neither host nor login are looked at for that.

        Raises:
            EnvironmentProblem: If nothing answers, or something else.
        """
        quiet_mlflow()
        from mlflow.utils import credentials, rest_utils

        login: Any = credentials.get_default_host_creds
        request: Any = rest_utils.http_request
        asked = time.time()
        try:
            with secrets_hidden(self._uri):
                address = with_secrets(self._uri)
                response = request(login(address), "/health", "GET")
        except Exception as error:  # its client has many ways to say so
            raise EnvironmentProblem(
                f"{self._uri} does not answer ({_reason(error)}): start the server there, or give "
                "another --tracking-uri"
            ) from None
        answered = time.time()
        if response.status_code != 200 or response.text != "OK":
            raise EnvironmentProblem(
                f"{self._uri} answers {response.status_code} to /health as no MLflow server does: "
                "check --tracking-uri, its path included"
            )
        told = response.headers.get("Date")
        seconds = parsedate_to_datetime(told).timestamp() if told else None
        return Answer(seconds, asked, answered)

    def check_access(self) -> None:
        """See whether the server takes this client's host name and login.

        Raises:
            EnvironmentProblem: If not, with what to set.
        """
        try:
            with secrets_hidden(self._uri):
                self._client().search_experiments(max_results=1)
        except Exception as error:
            raise EnvironmentProblem(f"{self._uri} {self._refusal(error)}") from None

    def check_records(self) -> None:
        """Write a run with a metric.

        Raises:
            EnvironmentProblem: If it is refused.
        """
        try:
            with secrets_hidden(self._uri):
                client = self._client()
                found = client.get_experiment_by_name(EXPERIMENT)
                experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
                self._run_id = client.create_run(experiment).info.run_id
                client.log_metric(self._run_id, "probe", 1.0)
        except Exception as error:
            raise EnvironmentProblem(
                f"{self._uri} takes no run in the experiment {EXPERIMENT!r} ({_reason(error)}): "
                "let this login make experiments and runs there"
            ) from None

    def check_artifacts(self) -> None:
        """Upload a file to the run of :meth:`check_records`, and read it back.

        The run is deleted then; ``mlflow gc`` removes what is left of it.

        Raises:
            EnvironmentProblem: If it is refused, or another comes back.
        """
        content = uuid.uuid4().hex
        try:
            with secrets_hidden(self._uri):
                client = self._client()
                try:
                    found = _sent_and_read(client, self._run_id, content)
                finally:
                    client.delete_run(self._run_id)
        except Exception as error:
            raise EnvironmentProblem(
                f"{self._uri} takes no file ({_reason(error)}): check the server's "
                "--artifacts-destination, and its log"
            ) from None
        if found != content:
            raise EnvironmentProblem(f"{self._uri} gives back another file than it was given")

    def _client(self) -> Any:
        quiet_mlflow()
        import mlflow

        return mlflow.MlflowClient(with_secrets(self._uri))

    def _refusal(self, error: Exception) -> str:
        text = str(error)
        if "Invalid Host header" in text:
            host = urlsplit(self._uri).netloc.rpartition("@")[2]
            return (
                f"refuses the host name that this client sends: start the server with {host} in "
                "its --allowed-hosts"
            )
        if getattr(error, "error_code", "") in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            given = [name for name in LOGIN if os.environ.get(name)]
            said = f"the login of {' and '.join(given)}" if given else "to answer without a login"
            return (
                f"refuses {said}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN, as the server knows them"
            )
        return f"does not do what it is asked ({_reason(error)}): see the server's log"


def _sent_and_read(client: Any, run_id: str, content: str) -> str:
    client.log_text(run_id, content, ARTIFACT)
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, ARTIFACT, folder)).read_text()


def _reason(error: Exception) -> str:
    """The first line, without the repetitions of the HTTP client."""
    line = first_line(error)
    _, found, cause = line.rpartition("(Caused by ")
    return cause.removesuffix(")") if found else line
