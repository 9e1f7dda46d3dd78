"""Studies and attempts that a job server does not know: refused as bad input, nothing is done."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from drtune_ray.cli.main import main
from tests.jobs.answering import MODE, answering, mode


def job(number: int, study: str, storage: str) -> dict[str, Any]:
    """A job that has ended, as Ray's job server tells it."""
    return {
        "type": "SUBMISSION",
        "submission_id": f"drtune-{study}-{number}",
        "entrypoint": "drtune-ray tune study.yaml",
        "status": "SUCCEEDED",
        "metadata": {
            "drtune_study": study,
            "drtune_storage": storage,
            "drtune_attempt": str(number),
            "drtune_settings": "",
        },
    }


JOBS = [job(1, "roses", "/shared"), job(1, "tulips", "/shared"), job(2, "tulips", "/other")]
UNKNOWN = "no study 'lilies' was submitted to ADDRESS; it has ['roses', 'tulips']"
ELSEWHERE = "no study 'roses' in /other was submitted to ADDRESS; it has ['roses', 'tulips']"
TWICE = (
    "studies named 'tulips' were submitted with the storages ['/other', '/shared']: choose one "
    "with --storage"
)
REFUSED = [
    (command, arguments, said)
    for command in ("logs", "status", "stop")
    for arguments, said in (
        (["lilies"], UNKNOWN),
        (["roses", "--storage", "/other"], ELSEWHERE),
        (["tulips"], TWICE),
    )
]
NO_ATTEMPT = ("logs", ["roses", "--attempt", "7"], "study 'roses' has no attempt 7: there are [1]")


@pytest.mark.parametrize(("command", "arguments", "said"), [*REFUSED, NO_ATTEMPT])
def test_it_is_said_what_there_is(
    command: str,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "x"}
    answers = {
        MODE: (200, mode("disabled")),
        "/api/version": (200, json.dumps(version)),
        "/api/jobs/": (200, json.dumps(JOBS)),
    }
    with answering(answers) as server:
        line = ["drtune-ray", command, *arguments, "--address", server.address]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as end:
            main()
    assert capsys.readouterr().err == f"drtune-ray: {said.replace('ADDRESS', server.address)}\n"
    assert end.value.code == 2
    assert {path for path, _ in server.requests} == answers.keys()
