"""Commands on a cluster, as far as they come without one; tests/jobs/test_jobs.py goes on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import COMMAND
from tests.jobs.answering import MODE, Answering, answering, mode
from tests.leftovers import free_port

STUDY = ["--data", "/images", "--storage", "/shared/studies", "--name", "a"]
VERSION = json.dumps({"version": "4", "ray_version": "2.60.0"})


def run(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [str(COMMAND), *arguments],
        env={**kept, "HOME": str(home), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def refused(done: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"drtune-ray: {message}\n"


@pytest.fixture
def server(tmp_path: Path) -> Any:
    """One that asks for no token and has no jobs."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("planted")
    answers = {MODE: mode("disabled"), "/api/version": VERSION, "/api/jobs/": "[]"}
    with answering({path: (200, text) for path, text in answers.items()}) as found:
        yield found


@pytest.mark.parametrize(
    "command", [["submit", *STUDY], ["logs", "a"], ["stop", "a"], ["status", "a"]]
)
def test_plain_http_to_another_machine__is_refused_first(tmp_path, server, command):
    address = f"http://0.0.0.0:{server.server_port}"
    done = run(tmp_path, *command, "--address", address)
    message = (
        f"--address {address} uses plain http to another machine: anyone on the network path can "
        "read the token and run code on the cluster. Give https://, reach the server through "
        "`ssh -L` or `kubectl port-forward` at http://127.0.0.1:PORT, or add --insecure-http if "
        "you trust the whole network"
    )
    refused(done, 2, message)
    assert server.requests == []


def test_a_server_that_everybody_may_use__is_said(tmp_path, server):
    address = f"http://0.0.0.0:{server.server_port}"
    done = run(tmp_path, "status", "a", "--address", address, "--insecure-http")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{address} asks for no token: whoever reaches it can run code there (SECURITY.md)",
        f"drtune-ray: no study 'a' was submitted to {address}",
    ]
    assert [path for path, _ in server.requests] == [MODE, *["/api/version"] * 2, "/api/jobs/"]
    assert "planted" not in str(server.requests)


def test_the_address_that_was_given__is_the_one_that_is_asked(tmp_path, server):
    """Ray's client would rather take these."""
    other = {name: "http://192.0.2.1:8265" for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    done = run(tmp_path, "stop", "a", "--address", server.address, **other)
    refused(done, 2, f"no study 'a' was submitted to {server.address}")


def test_a_request_that_is_refused_here__reaches_no_server(tmp_path, server):
    given = ["--address", server.address, "--set", "method.bank_size=0"]
    done = run(tmp_path, "submit", *STUDY, *given)
    assert done.returncode == 2
    assert done.stderr.startswith("drtune-ray: trial.method.bank_size=0 is not valid: ")
    assert server.requests == []


def test_nobody_answers(tmp_path):
    address = f"http://127.0.0.1:{free_port()}"
    done = run(tmp_path, "submit", *STUDY, "--address", address)
    message = (
        "does not answer (Connection refused): check the address, and that the cluster is running"
    )
    refused(done, 3, f"{address} {message}")


def test_a_server_that_breaks(tmp_path, server: Answering):
    trace = "Traceback (most recent call last):\n  File x\nValueError: no room."
    server.answers["/api/jobs/"] = (500, trace)
    done = run(tmp_path, "submit", *STUDY, "--address", server.address)
    refused(done, 3, f"{server.address} rejected the request: ValueError: no room")


def test_an_error_is_the_last_object_too(tmp_path):
    done = run(tmp_path, "submit", *STUDY, "--address", "http://10.0.0.7:8265", "--json")
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["kind"], found["exit_code"]) == ("result", 2)
    assert done.stderr == f"drtune-ray: {found['reason']}\n"
