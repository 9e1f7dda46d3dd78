"""Whether a token is needed, asked of a server that writes down what it gets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.jobs.token import needed_token
from tests.jobs.answering import MODE, Answering, answering, mode
from tests.leftovers import free_port

TOKEN = "b7c1a2"


@pytest.fixture
def asked() -> Iterator[Answering]:
    with answering({MODE: (200, mode("token"))}) as server:
        yield server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_needed_token__in_the_order_of_ray(asked, home, monkeypatch):
    default = write(home / ".ray" / "auth_token", f"{TOKEN}\n")
    token = needed_token(asked.address)
    assert (token.value, token.source) == (TOKEN, str(default))
    named = write(home / "named", "of-the-file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    token = needed_token(asked.address)
    assert (token.value, token.source) == ("of-the-file", str(named))
    monkeypatch.setenv("RAY_AUTH_TOKEN", " of-the-variable ")
    token = needed_token(asked.address)
    assert (token.value, token.source) == ("of-the-variable", "RAY_AUTH_TOKEN")
    assert "of-the-variable" not in repr(token)


def test_needed_token__is_asked_without_it(asked, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    needed_token(asked.address)
    ((path, headers),) = asked.requests
    assert path == MODE
    assert TOKEN not in str(headers)


def test_needed_token__not_where_none_is_asked_for(asked, monkeypatch):
    asked.answers[MODE] = (200, mode("disabled"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert needed_token(asked.address) is None


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_needed_token__missing(asked, home, content):
    if content is not None:
        write(home / ".ray" / "auth_token", content)
    with pytest.raises(EnvironmentProblem) as caught:
        needed_token(asked.address)
    message = str(caught.value)
    assert message.startswith(f"{asked.address} requires a token")
    for place in ("~/.ray/auth_token ", "RAY_AUTH_TOKEN_PATH ", "RAY_AUTH_TOKEN. "):
        assert place in message
    assert message.endswith("Nothing was sent")


def test_needed_token__a_file_that_is_not_there(asked, home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "no"))
    with pytest.raises(EnvironmentProblem) as caught:
        needed_token(asked.address)
    assert str(caught.value) == (
        f"the token file {home}/no cannot be read: No such file or directory"
    )


@pytest.mark.parametrize(
    ("status", "answer", "why"),
    [(404, "", " (HTTP 404)"), (200, "<html>", ""), (200, "[]", ""), (200, "{}", "")],
)
def test_needed_token__another_server(asked, status, answer, why):
    asked.answers[MODE] = (status, answer)
    with pytest.raises(EnvironmentProblem) as caught:
        needed_token(asked.address)
    assert str(caught.value) == (
        f"{asked.address} does not answer like Ray's job server{why}: give the address of the "
        "cluster's dashboard, of Ray 2.60"
    )


def test_needed_token__nobody_answers(monkeypatch):
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EnvironmentProblem) as caught:
        needed_token(address)
    assert str(caught.value).startswith(
        f"{address} does not answer (Connection refused): check the address"
    )


def test_needed_token__nobody_answers_a_connection(monkeypatch):
    """A server that takes connections and says nothing."""
    monkeypatch.setattr("drtune_ray.jobs.token.ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(EnvironmentProblem) as caught:
            needed_token(address)
    assert time.monotonic() - started < 5
    assert str(caught.value).startswith(f"{address} does not answer (timed out): check the address")
