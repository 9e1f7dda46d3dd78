"""Check that an MLflow server accepts what a study sends, with the recorder's own client."""

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
from drtune_ray.tracking.mlflow_client import quiet_mlflow

EXPERIMENT = "drtune-ray-doctor"
ARTIFACT = "probe.txt"
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True)
class Answer:
    """Times of a server's first answer, in seconds since 1970.

    Attributes:
        server_seconds: Time of the server, whole seconds; None if it sends no Date header.
        sent_seconds, received_seconds: Times of this machine before and after the request.
    """

    server_seconds: float | None
    sent_seconds: float
    received_seconds: float


class ServerProbe:
    """An MLflow server, or a store that MLflow opens itself.

    Args:
        uri: Tracking URI.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._run_id = ""

    def check_health(self) -> Answer:
        """Request the health page, for which the server checks neither host name nor login.

        Raises:
            EnvironmentProblem: If nothing answers, or the answer is not MLflow's.
        """
        quiet_mlflow()
        from mlflow.utils import credentials, rest_utils

        login: Any = credentials.get_default_host_creds
        request: Any = rest_utils.http_request
        sent = time.time()
        try:
            with secrets_hidden(self._uri):
                address = with_secrets(self._uri)
                response = request(login(address), "/health", "GET")
        except Exception as error:  # the client raises many types
            raise EnvironmentProblem(
                f"{self._uri} does not answer ({_reason(error)}): start the server there, or give "
                "another --tracking-uri"
            ) from None
        received = time.time()
        if response.status_code != 200 or response.text != "OK":
            raise EnvironmentProblem(
                f"{self._uri} answers {response.status_code} to /health, unlike an MLflow server: "
                "check --tracking-uri, including its path"
            )
        date = response.headers.get("Date")
        seconds = parsedate_to_datetime(date).timestamp() if date else None
        return Answer(seconds, sent, received)

    def check_access(self) -> None:
        """Check that the server accepts this client's host name and login.

        Raises:
            EnvironmentProblem: If not, with the setting to change.
        """
        try:
            with secrets_hidden(self._uri):
                self._client().search_experiments(max_results=1)
        except Exception as error:
            raise EnvironmentProblem(f"{self._uri} {self._refusal(error)}") from None

    def check_records(self) -> None:
        """Create a run with a metric.

        Raises:
            EnvironmentProblem: If the server refuses it.
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
                f"{self._uri} does not accept a run in the experiment {EXPERIMENT!r} "
                f"({_reason(error)}): allow this login to create experiments and runs"
            ) from None

    def check_artifacts(self) -> None:
        """Upload a file to the run of :meth:`check_records`, and read it back.

        The run is deleted afterwards; ``mlflow gc`` removes it for good.

        Raises:
            EnvironmentProblem: If the server refuses it, or returns another file.
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
                f"{self._uri} does not accept a file ({_reason(error)}): check the server's "
                "--artifacts-destination, and its log"
            ) from None
        if found != content:
            raise EnvironmentProblem(f"{self._uri} returns another file than was uploaded")

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
            what = f"the login from {' and '.join(given)}" if given else "requests without a login"
            return (
                f"refuses {what}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN, to a login of the server"
            )
        return f"failed ({_reason(error)}): see the server's log"


def _sent_and_read(client: Any, run_id: str, content: str) -> str:
    client.log_text(run_id, content, ARTIFACT)
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, ARTIFACT, folder)).read_text()


def _reason(error: Exception) -> str:
    """Return the first line of an error, without what the HTTP client puts around it."""
    line = first_line(error)
    _, found, cause = line.rpartition("(Caused by ")
    return cause.removesuffix(")") if found else line
