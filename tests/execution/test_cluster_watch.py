"""Watching what a study needs of Ray, with sockets in its place; tests/study/test_survival.py kills
the real ones.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.execution.cluster_watch import Service, watched
from drtune_ray.execution.interrupts import signals_as_interrupt


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def service(listener: socket.socket, patience: float = 0.1) -> Service:
    return Service("the head", *listener.getsockname(), patience)


def test_watched__a_service_that_ends_interrupts_the_block(listener: socket.socket) -> None:
    head = service(listener)
    start = time.monotonic()
    with pytest.raises(EnvironmentProblem) as caught, watched([head]):
        threading.Timer(0.2, listener.close).start()
        time.sleep(30)
    assert time.monotonic() - start < 10
    assert str(caught.value).startswith(f"the head (127.0.0.1:{head.port}) has ended")
    assert "Nothing that was saved is lost" in str(caught.value)


def test_watched__one_that_comes_back_in_time(listener: socket.socket) -> None:
    head = service(listener, patience=20.0)
    with watched([head]):
        listener.close()
        time.sleep(1.2)
        assert head.is_closed()
        with socket.create_server(("127.0.0.1", head.port)):
            time.sleep(0.6)


def test_watched__an_error_that_the_end_leads_to(listener: socket.socket) -> None:
    """Ray may raise before anybody has looked."""
    with pytest.raises(EnvironmentProblem, match="^the head"), watched([service(listener, 20.0)]):
        listener.close()
        raise RuntimeError("owner died")


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), ConfigError("no")])
def test_watched__other_errors_stay(listener: socket.socket, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, watched([service(listener)]):
        raise error
    assert caught.value is error


def test_watched__ctrl_c_stays_ctrl_c(listener: socket.socket) -> None:
    with pytest.raises(KeyboardInterrupt), signals_as_interrupt(), watched([service(listener)]):
        signal.raise_signal(signal.SIGINT)


STUCK = """
import signal, socket, threading, time
from drtune_ray.execution import cluster_watch as watch

watch.REACTION_SECONDS = watch.SENDING_SECONDS = 0.2
listener = socket.create_server(("127.0.0.1", 0))
head = watch.Service("the head", *listener.getsockname(), 0.1)
threading.Timer(0.2, listener.close).start()
with watch.watched([head], lambda: print("killed")), watch.told_of_end(lambda: print("told")):
    signal.pthread_sigmask(signal.SIG_BLOCK, {watch.SIGNAL})  # as a call of Ray's does
    time.sleep(30)
"""


def test_watched__a_main_thread_that_is_stuck() -> None:
    """It is a call of Ray's that waits for the head; it ended with the exit code 1."""
    done = subprocess.run([sys.executable, "-u", "-c", STUCK], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "told\nkilled\n")
    assert done.stderr.startswith("drtune-ray: the head (127.0.0.1:")


def test_is_closed__not_where_a_process_is_only_busy() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        busy = [socket.socket() for _ in range(4)]
        for one in busy:
            one.setblocking(False)
            one.connect_ex(address)
        assert not Service("a busy one", *address, 1.0).is_closed()
        for one in busy:
            one.close()
