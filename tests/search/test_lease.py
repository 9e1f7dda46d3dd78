from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from drtune_ray.data.artifacts import LocalFolder
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.search import lease
from drtune_ray.search.lease import LEASE_NAME, artifacts_lease


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "flowers")


def holder(**changes: object) -> bytes:
    values = {"host": "elsewhere", "pid": 7, "beat": 3, "token": "theirs"}
    return json.dumps(values | changes).encode()


def test_artifacts_lease__is_held_kept_fresh_and_given_back(folder: LocalFolder) -> None:
    with artifacts_lease(folder, "flowers"):
        first = json.loads(folder.read(LEASE_NAME))
        assert (first["host"], first["pid"]) == (socket.gethostname(), os.getpid())
        time.sleep(0.5)
        assert json.loads(folder.read(LEASE_NAME))["beat"] >= 2
    assert folder.names() == []


def test_artifacts_lease__a_driver_elsewhere_that_lives_is_not_disturbed(
    folder: LocalFolder,
) -> None:
    is_over = threading.Event()

    def live() -> None:
        beat = 0
        while not is_over.wait(0.05):
            beat += 1
            folder.write(LEASE_NAME, holder(beat=beat))

    folder.write(LEASE_NAME, holder())
    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(EnvironmentProblem) as caught, artifacts_lease(folder, "flowers"):
            pass
    finally:
        is_over.set()
        thread.join()
    assert str(caught.value) == (
        "study 'flowers' is being run by process 7 on elsewhere: wait for it or end it first"
    )
    assert json.loads(folder.read(LEASE_NAME))["token"] == "theirs"


def test_artifacts_lease__a_driver_elsewhere_that_died_is_waited_for(
    folder: LocalFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write(LEASE_NAME, holder())
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), artifacts_lease(folder, "flowers"):
        assert 0.3 <= time.monotonic() - started < 5
    assert "was last run by process 7 on elsewhere: waiting 0.3 s" in caplog.text


@pytest.mark.parametrize("left", [b"", b"[]", b"{half"])
def test_artifacts_lease__no_lease_of_ours(folder: LocalFolder, left: bytes) -> None:
    folder.write(LEASE_NAME, left)
    with artifacts_lease(folder, "flowers"):
        pass


def test_artifacts_lease__a_killed_process_of_this_machine_is_not_waited_for(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 60.0)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    for pid in (child, os.getpid()):  # the second: in a container that was started again
        folder.write(LEASE_NAME, holder(host=socket.gethostname(), pid=pid))
        with artifacts_lease(folder, "flowers"):
            pass


def test_artifacts_lease__a_holder_that_was_replaced_stops(folder: LocalFolder) -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), artifacts_lease(folder, "flowers"):
            folder.write(LEASE_NAME, holder())
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert json.loads(folder.read(LEASE_NAME))["token"] == "theirs"
