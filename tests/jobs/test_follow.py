"""Following an attempt over connections that break, on a job server whose answers are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.jobs import follow as follow_module
from drtune_ray.jobs.attempts import Attempt
from drtune_ray.jobs.follow import follow, stop

BEGUN = Attempt("drtune-a-1", "a", "/shared", 1, "", "RUNNING", None, "", 0.0, None)
LOST = EnvironmentProblem("lost")


class Written:
    """Says in turn what it was given.

    Args:
        states: Of the attempt, each time it is asked for; the last stays.
        logs: The whole log at each connection, in pieces; an error breaks the connection.
    """

    def __init__(self, states: list[Any], *logs: list[Any]) -> None:
        self.states, self.logs, self.stopped = list(states), list(logs), list[str]()
        self.whole = ""

    def attempt(self, submission_id: str) -> Attempt:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return replace(BEGUN, state=state, message="no room")

    def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)
        self.states = ["STOPPED"]

    def log(self, submission_id: str) -> str:
        return self.whole

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        for piece in self.logs.pop(0):
            if piece is None:
                await asyncio.sleep(3600)
            if isinstance(piece, BaseException):
                raise piece
            yield piece


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "PAUSES_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(follow_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(follow_module, "PENDING_SECONDS", 0.05)
    monkeypatch.setattr(follow_module, "SILENT_SECONDS", 0.05)


def followed(server: Any, **options: Any) -> tuple[Attempt | None, str, list[str]]:
    shown, told = list[str](), list[str]()
    ended = follow(server, BEGUN, shown.append, told.append, **options)
    return ended, "".join(shown), told


def test_follow__to_the_end():
    ended, shown, told = followed(Written(["RUNNING", "SUCCEEDED"], ["one\n", "two\n"]))
    assert ended is not None and ended.state == "SUCCEEDED"
    assert (shown, told) == ("one\ntwo\n", [])


def test_follow__each_part_is_shown_once_however_it_is_cut():
    whole = "".join(f"line {number}\n" for number in range(20))
    server = Written(
        ["RUNNING", "RUNNING", "SUCCEEDED"],
        [whole[:10], whole[10:33], LOST],
        [whole[:40], LOST],
        [LOST],
        [whole[:35], whole[35:90]],
        [whole[:89], whole[89:]],
    )
    ended, shown, _ = followed(server)
    assert shown == whole
    assert ended is not None and ended.is_over


@pytest.mark.parametrize("last", ["RUNNING", LOST])
def test_follow__a_lost_server_is_tried_again_and_given_up(last):
    server = Written(["RUNNING", last], ["one\n", LOST], [LOST], [LOST], ["never"])
    with pytest.raises(EnvironmentProblem) as caught:
        followed(server)
    assert (
        str(caught.value)
        == "lost. drtune-a-1 may still be running: repeat the command to attach to it"
    )
    assert server.logs == [["never"]]


def test_follow__a_log_that_is_lost_with_its_node():
    server = Written(["RUNNING", "FAILED"], ["one\n", LOST], [LOST], [LOST])
    ended, shown, told = followed(server)
    assert ended is not None and ended.state == "FAILED"
    assert (shown, told) == ("one\n", ["The rest of the log cannot be read: lost"])


def test_follow__a_connection_that_died_without_a_word():
    server = Written(["RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"], ["one\n", None])
    server.whole = "one\ntwo\n"
    ended, shown, _ = followed(server)
    assert ended is not None and ended.state == "SUCCEEDED"
    assert shown == "one\ntwo\n"


def test_follow__a_server_that_is_lost_in_silence():
    server = Written(["RUNNING", LOST, "SUCCEEDED"], ["one\n", None], ["one\n", "two\n"])
    assert followed(server)[1] == "one\ntwo\n"


def test_follow__what_is_pending_is_said():
    server = Written(["PENDING"] * 20 + ["RUNNING", "SUCCEEDED"], ["one\n"])
    _, shown, told = followed(server)
    assert shown == "one\n"
    assert told == ["Job drtune-a-1 is pending: no room"]


def test_follow__ctrl_c_leaves_it():
    server = Written(["RUNNING"], ["one\n", KeyboardInterrupt()])
    assert followed(server) == (None, "one\n", [])
    assert server.stopped == []


def test_follow__ctrl_c_stops_it_where_that_is_wanted():
    server = Written(["RUNNING"], ["one\n", KeyboardInterrupt()], ["one\n", "saved\n"])
    ended, shown, told = followed(server, is_stopped=True)
    assert ended is not None and ended.state == "STOPPED"
    assert (shown, told) == ("one\nsaved\n", ["Stopping drtune-a-1"])
    assert server.stopped == ["drtune-a-1"]


def test_follow__a_second_ctrl_c_leaves_it():
    server = Written(["RUNNING"], [KeyboardInterrupt()], [KeyboardInterrupt()])
    assert followed(server, is_stopped=True)[0] is None


def test_stop__waits_for_the_end():
    server = Written(["RUNNING"])
    assert stop(server, BEGUN).state == "STOPPED"


def test_stop__what_does_not_end(monkeypatch):
    monkeypatch.setattr(follow_module, "STOP_SECONDS", 0.05)
    server = Written(["RUNNING"])
    monkeypatch.setattr(server, "stop", lambda _: None)
    with pytest.raises(EnvironmentProblem) as caught:
        stop(server, BEGUN)
    assert str(caught.value) == (
        "drtune-a-1 is still running 0.05 s after the request to stop: check the cluster"
    )


def test_stop__what_has_not_started(monkeypatch):
    server = Written(["PENDING"])
    monkeypatch.setattr(server, "stop", lambda _: None)
    with pytest.raises(EnvironmentProblem) as caught:
        stop(server, BEGUN)
    assert str(caught.value) == (
        "drtune-a-1 has not started yet, and Ray stops it once it has. If the cluster never "
        "provides its resources, Ray gives up after 15 minutes"
    )
