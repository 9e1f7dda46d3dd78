"""A real MLflow server behind a proxy that is slow, refuses, or loses an answer."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from drtune_ray.tracking.events import MetricsRecorded, RunFinished, RunStarted, StepsRecorded
from drtune_ray.tracking.mlflow_client import quiet_mlflow
from drtune_ray.tracking.mlflow_recorder import MlflowRecorder
from drtune_ray.tracking.spool import Spool
from drtune_ray.tracking.writer import BackgroundWriter
from tests.servers import mlflow_server
from tests.tracking.sending import send_unsent

pytestmark = pytest.mark.slow

ANSWER_SECONDS = 60.0


class Proxy(ThreadingHTTPServer):
    """Forwards requests to a server; its attributes say what goes wrong."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = server.removeprefix("http://")
        self.num_lost, self.seconds, self.status = 0, 0.0, 0
        self.hurry = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Proxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.hurry.wait(self.server.seconds)
        if self.server.status:
            self.answer(self.server.status, b'{"error_code": "PERMISSION_DENIED"}')
            return
        connection = http.client.HTTPConnection(self.server.upstream)
        headers = {"Content-Type": self.headers.get("Content-Type") or "application/json"}
        connection.request(self.command, self.path, body, headers)
        found = connection.getresponse()
        content = found.read()
        connection.close()
        if self.path.endswith("/runs/create") and self.server.num_lost:
            self.server.num_lost -= 1
            self.close_connection = True  # without an answer
            return
        self.answer(found.status, content)

    do_GET = do_POST = do_PATCH = forward  # noqa: N815

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    quiet_mlflow()
    with mlflow_server(tmp_path_factory.mktemp("mlflow") / "server") as address:
        server = Proxy(address)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("num_retries", ["0", "3"])
def test_a_lost_answer_to_create_run_makes_no_second_run(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_retries: str
) -> None:
    """Of MLflow's client, which repeats the request if it is asked to retry."""
    import mlflow
    from mlflow.entities import ViewType

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", num_retries)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    name = f"lost-{num_retries}"
    spool, recorder = Spool(tmp_path), MlflowRecorder(proxy.address, name, name)
    events = (
        RunStarted(None, "study", {}, {}, 1),
        RunStarted(0, "t000", {"a": 1}, {}, 2),
        MetricsRecorded(0, 1, {"loss": 1.0}, 3),
        RunFinished(0, "COMPLETE", "completed", {}, {}, 4),
        RunFinished(None, "COMPLETE", "completed", {}, {}, 5),
    )
    for event in events:
        spool.append(event)
    proxy.num_lost = 2
    for _ in range(4):  # as the writer does
        try:
            send_unsent(spool, recorder)
        except Exception as error:
            assert "Remote end closed connection" in str(error)  # noqa: PT017
    assert (spool.num_unsent(), proxy.num_lost) == (0, 0)
    client = mlflow.MlflowClient(proxy.address)
    number = client.get_experiment_by_name(name).experiment_id
    runs = client.search_runs([number])
    removed = client.search_runs([number], run_view_type=ViewType.DELETED_ONLY)
    assert len(removed) == (2 if num_retries == "3" else 0)
    assert sorted(run.info.run_name for run in runs) == ["study", "t000"]
    by_name = {run.info.run_name: run for run in runs}
    assert by_name["t000"].data.metrics == {"loss": 1.0}
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.parametrize(
    ("seconds", "status"),
    [(0.0, 0), (ANSWER_SECONDS, 0), (0.0, 401), (0.0, 403), (0.0, -1)],
    ids=["live", "slow", "refuses login", "refuses host", "dead"],
)
def test_an_epoch_waits_for_no_answer_of_the_server(
    proxy: Proxy, tmp_path: Path, seconds: float, status: int
) -> None:
    """At a hundred epochs a second; benchmarks/tracking.py measures how long the calls take."""
    address = "http://127.0.0.1:9" if status < 0 else proxy.address
    proxy.seconds, proxy.status = seconds, max(status, 0)
    proxy.hurry.clear()
    metrics = {f"metric_{k}": 0.5 for k in range(20)}
    recorder = MlflowRecorder(address, "waiting", f"study-{seconds}-{status}")
    started = time.monotonic()
    writer = BackgroundWriter(Spool(tmp_path), recorder)
    try:
        for epoch in range(200):
            writer.emit(MetricsRecorded(0, epoch, metrics))
            writer.emit(StepsRecorded(0, 4 * epoch, [{"loss": 1.0}] * 4, 1))
            time.sleep(0.01)
    finally:
        writer.close(timeout_seconds=0.1, max_seconds=0.0)
        proxy.seconds, proxy.status = 0.0, 0
        proxy.hurry.set()
    # Had one call of the 400 waited, that alone would have taken longer.
    assert time.monotonic() - started < ANSWER_SECONDS
