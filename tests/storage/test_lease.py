from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.folders import LocalFolder
from drtune_ray.storage import lease
from drtune_ray.storage.lease import (
    LEASE_NAME,
    Lease,
    artifacts_lease,
    repeated,
)


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.05)


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "flowers")


def holder(**changes: object) -> bytes:
    values = {"host": "elsewhere", "pid": 7, "beat": 3, "token": "theirs"}
    return json.dumps(values | changes).encode()


def here() -> dict[str, object]:
    return {"host": socket.gethostname(), "machine": lease.this_machine()}


class Away(LocalFolder):
    """A folder that can be out of reach."""

    is_away = False

    def read(self, name: str) -> bytes:
        if self.is_away:
            raise OSError("AWS Error NETWORK_CONNECTION")
        return super().read(name)

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        if self.is_away:
            raise OSError("AWS Error NETWORK_CONNECTION")
        super().write(name, *parts)


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
        folder.write(LEASE_NAME, holder(pid=pid, **here()))
        with artifacts_lease(folder, "flowers"):
            pass


def test_artifacts_lease__another_container_of_the_same_name_is_waited_for(
    folder: LocalFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process numbers mean nothing in another namespace, nor after another boot."""
    former = holder(pid=os.getpid(), **here())
    assert lease._died_here(json.loads(former))
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text(
        (lease.PROC / "sys/kernel/random/boot_id").read_text()
    )
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to("pid:[1]")
    monkeypatch.setattr(lease, "PROC", tmp_path)
    assert not lease._died_here(json.loads(former))
    monkeypatch.setattr(lease, "PROC", tmp_path / "none")  # not Linux
    assert lease._died_here(json.loads(holder(pid=os.getpid(), **here())))


def test_artifacts_lease__of_two_that_start_together_one_enters(folder: LocalFolder) -> None:
    refused: list[str] = []
    entered: list[float] = []
    all_began, is_over = threading.Barrier(2), threading.Event()

    class Together(LocalFolder):
        """Both have found no lease before one is written."""

        def read(self, name: str) -> bytes:
            try:
                return super().read(name)
            except FileNotFoundError:
                all_began.wait(10)
                raise

    def drive() -> None:
        try:
            with artifacts_lease(Together(folder.path), "flowers"):
                entered.append(time.monotonic())
                is_over.wait(10)
        except EnvironmentProblem as problem:
            refused.append(str(problem))
            is_over.set()

    threads = [threading.Thread(target=drive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(entered) == 1
    assert refused == [
        f"study 'flowers' is being run by process {os.getpid()} on {socket.gethostname()}: wait "
        "for it or end it first"
    ]
    assert folder.names() == []


def test_artifacts_lease__another_thread_of_this_process_holds_it(folder: LocalFolder) -> None:
    with artifacts_lease(folder, "flowers"):
        with pytest.raises(EnvironmentProblem, match="is being run by process"):
            with artifacts_lease(folder, "flowers"):
                pass


def test_lease__a_holder_that_was_replaced_is_told_so(
    folder: LocalFolder, caplog: pytest.LogCaptureFixture
) -> None:
    mine = Lease(folder, "flowers")
    mine.take()
    mine.beat()
    mine.check()
    folder.write(LEASE_NAME, holder())
    for _ in range(2):
        mine.beat()
    with pytest.raises(EnvironmentProblem) as caught:
        mine.check()
    assert str(caught.value) == (
        "study 'flowers' was taken over by process 7 on elsewhere, so this run of it stopped"
    )
    assert caplog.text.count("was taken over by process 7 on elsewhere: this run stops") == 1
    mine.give_back()
    assert json.loads(folder.read(LEASE_NAME))["token"] == "theirs"


def test_artifacts_lease__the_loop_finds_out(folder: LocalFolder) -> None:
    with pytest.raises(EnvironmentProblem, match="was taken over by process 7 on elsewhere"):
        with artifacts_lease(folder, "flowers") as mine:
            folder.write(LEASE_NAME, holder())
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                mine.check()
                time.sleep(0.01)


def test_lease__a_holder_that_cannot_be_seen_stops_before_another_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 10.0)
    assert lease.MAX_SILENT_BEATS < lease.NUM_MISSED_BEATS
    now, folder = [100.0], Away(tmp_path)
    mine = Lease(folder, "flowers", clock=lambda: now[0])
    mine.take()
    folder.is_away = True
    now[0] += 20.0
    with pytest.raises(OSError, match="NETWORK"):
        mine.beat()
    mine.check()
    now[0] += 1.0
    with pytest.raises(EnvironmentProblem) as caught:
        mine.check()
    assert str(caught.value) == (
        "the artifacts did not take the lease of study 'flowers' for 21 s, and another driver may "
        "take the study over: the same command resumes it when they answer again"
    )
    folder.is_away = False
    mine.beat()
    mine.check()  # nobody took it


def test_artifacts_lease__artifacts_that_go_away_do_not_hide_why_it_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Away(tmp_path)
    with pytest.raises(KeyError, match="the real one"), artifacts_lease(folder, "flowers"):
        folder.is_away = True
        raise KeyError("the real one")
    assert (
        f"artifacts: {tmp_path}/driver.json stays (AWS Error NETWORK_CONNECTION); the next driver "
        "waits for it" in caplog.text
    )
    with pytest.raises(EnvironmentProblem) as caught, artifacts_lease(folder, "flowers"):
        pass
    assert str(caught.value) == (
        f"artifacts='{tmp_path}/driver.json' failed (AWS Error "
        "NETWORK_CONNECTION): repeat the command once it can be reached again"
    )


def test_repeated__goes_on_after_any_error(caplog: pytest.LogCaptureFixture) -> None:
    calls = threading.Semaphore(0)

    def fail() -> None:
        calls.release()
        raise ZeroDivisionError

    with repeated(0.01, fail):
        for _ in range(3):
            assert calls.acquire(timeout=10)
    assert "artifacts: ZeroDivisionError" in caplog.text
