from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from io import StringIO

import pytest

from drtune_ray.display.jobs import JsonLog, job_facts, job_lines, submit_lines, ways_on
from drtune_ray.jobs.attempts import Attempt
from drtune_ray.jobs.submission import study_submission

START = datetime(2026, 11, 25, 20, 9, 16).timestamp()
STOPPED = Attempt("drtune-a-1", "a", "/shared", 1, "x", "STOPPED", None, "", START, START + 75)
FAILED = Attempt(
    "drtune-a-2", "a", "/shared", 2, "x", "FAILED", 2, "long", START + 100, START + 102
)
PENDING = Attempt("drtune-a-3", "a", "/shared", 3, "x", "PENDING", None, "no room", START, None)
ADDRESS = "http://127.0.0.1:8265"
HEAD = f"Study 'a' in /shared, jobs at {ADDRESS}:"


def test_job_lines() -> None:
    assert list(job_lines([STOPPED, FAILED], ADDRESS)) == [
        HEAD,
        "  drtune-a-1  stopped; since 2026-11-25 20:09:16, for 1 min 15 s",
        "  drtune-a-2  failed with exit code 2; since 2026-11-25 20:10:56, for 2 s",
        "  Job drtune-a-2 failed with exit code 2: see its log",
    ]
    assert list(job_lines([PENDING], ADDRESS, START + 9)) == [
        HEAD,
        "  drtune-a-3  pending; since 2026-11-25 20:09:16, for 9 s",
        "  no room",
    ]


def test_job_facts() -> None:
    job = {"submission_id": "drtune-a-2", "number": 2, "settings": "x", "state": "FAILED"}
    job |= {"exit_code": 2, "message": "long", "started": START + 100, "ended": START + 102}
    assert job_facts([FAILED], ADDRESS) == {
        "study": "a",
        "storage": "/shared",
        "address": ADDRESS,
        "jobs": [job],
    }


def test_ways_on() -> None:
    where = "a --storage /shared --address http://h:1 --insecure-http"
    assert list(ways_on(PENDING, "http://h:1 --insecure-http", "drtune-ray")) == [
        f"Follow it:  drtune-ray logs {where} --follow",
        f"Stop it:    drtune-ray stop {where}",
    ]


def test_submit_lines() -> None:
    flags = {"data_folder": "/images", "storage": "/shared", "name": "a"}
    study = study_submission(None, [], flags)
    same = replace(PENDING, settings=study.settings)
    assert list(submit_lines(study, same, is_new=True)) == ["Submitted drtune-a-3 with study.yaml"]
    assert list(submit_lines(study, same, is_new=False)) == [
        "drtune-a-3 is already pending: nothing was submitted"
    ]
    assert list(submit_lines(study, PENDING, is_new=False)) == [
        "drtune-a-3 is already pending: nothing was submitted",
        "It was submitted with other settings; to apply these, stop it first",
    ]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_json_log__objects_alone_go_to_stdout(size: int) -> None:
    text = 'Running entrypoint\n{"kind": "a"}\nwarning {"x": 1}\n{"kind": "result"}\n'
    out, err = StringIO(), StringIO()
    log = JsonLog(out, err)
    for start in range(0, len(text), size):
        log.write(text[start : start + size])
    assert out.getvalue() == '{"kind": "a"}\n{"kind": "result"}\n'
    assert err.getvalue() == 'Running entrypoint\nwarning {"x": 1}\n'
    log.close(3, "not said")  # the log has it
    assert out.getvalue().endswith('{"kind": "result"}\n')


def test_json_log__an_end_that_is_not_logged() -> None:
    out = StringIO()
    log = JsonLog(out, StringIO())
    log.write('{"kind": "a"}\n{"kind": "res')
    log.close(3, "killed")
    last = json.loads(out.getvalue().splitlines()[-1])
    assert (last["kind"], last["exit_code"], last["reason"]) == ("result", 3, "killed")
