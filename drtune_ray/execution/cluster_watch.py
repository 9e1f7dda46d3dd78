"""The end of Ray under a running study: noticed, named, and followed by an end in order.

Ray itself ends this process, with the exit code 1: some seconds after its node's process has died,
and a minute after the cluster's head has (Ray 2.60). No run in MLflow would be ended then. Until
then a call of Ray may block the main thread, which then takes no signal.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from drtune_ray.errors import DrtuneError, EnvironmentProblem

LOOK_SECONDS = 0.5
ANSWER_SECONDS = 2.0
# Nobody starts these again.
LOCAL_SECONDS = 2.0
# A head may come back, with its memory in a database. Ray gives up after 60 s.
HEAD_SECONDS = 30.0
# Time for the main thread to leave what it waits for, and for MLflow's thread to send the ends.
REACTION_SECONDS, SENDING_SECONDS = 5.0, 5.0

SIGNAL = signal.SIGUSR2
_tellers: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Service:
    """A process of Ray that a study cannot do without.

    Attributes:
        name: What it is, for messages.
        host: Its address.
        port: A port on which it listens.
        patience_seconds: How long nothing may listen there.
    """

    name: str
    host: str
    port: int
    patience_seconds: float

    def is_closed(self) -> bool:
        """Return whether nothing listens there; a process that is only busy does."""
        try:
            socket.create_connection((self.host, self.port), ANSWER_SECONDS).close()
        except TimeoutError:
            return False
        except OSError:
            return True
        return False

    def end(self) -> str:
        """Return the message about its end."""
        return (
            f"{self.name} ({self.host}:{self.port}) has ended or cannot be reached any more. "
            "Nothing that was saved is lost: repeat the command once Ray runs again (one that the "
            "command starts itself does at once)"
        )


@contextmanager
def told_of_end(tell: Callable[[], None]) -> Iterator[None]:
    """Have a function called if Ray ends within a block and the main thread does not leave it.

    Args:
        tell: Informs the observers; called from another thread.
    """
    _tellers.append(tell)
    try:
        yield
    finally:
        _tellers.remove(tell)


@contextmanager
def watched(services: Sequence[Service], kill: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Raise on the main thread when a service has ended; if it is stuck, end this process.

    Args:
        services: What must not end.
        kill: Ends what this process has started, before it is ended itself.

    Raises:
        EnvironmentProblem: Naming the service, in place of whatever its end leads to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    watch = _Watch(services, kill)
    former = signal.signal(SIGNAL, watch.interrupt)
    watch.thread.start()
    try:
        yield
    except DrtuneError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and watch.ended is None:
            raise
        if (ended := watch.ended or watch.closed()) is None:
            raise
        raise EnvironmentProblem(ended.end()) from error
    finally:
        watch.left.set()
        watch.thread.join()
        signal.signal(SIGNAL, former)


class _Watch:
    """Looks at services from a thread.

    Attributes:
        thread: The thread.
        ended: The service that has ended.
        left: Set when the main thread has reacted, or nobody needs to look any more.
    """

    def __init__(self, services: Sequence[Service], kill: Callable[[], None]) -> None:
        self._services, self._kill = services, kill
        self.thread = threading.Thread(target=self._look, name="cluster watch", daemon=True)
        self.ended: Service | None = None
        self.left = threading.Event()

    def closed(self) -> Service | None:
        """Return a service where nothing listens now."""
        return next((service for service in self._services if service.is_closed()), None)

    def interrupt(self, signum: int, frame: Any) -> None:
        """Raise KeyboardInterrupt on the main thread, which lets a study end in order."""
        self.left.set()
        raise KeyboardInterrupt

    def _look(self) -> None:
        answered = dict.fromkeys(self._services, time.monotonic())
        while not self.left.wait(LOOK_SECONDS):
            for service in self._services:
                now = time.monotonic()
                if not service.is_closed():
                    answered[service] = now
                elif now - answered[service] >= service.patience_seconds:
                    self.ended = service
                    signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
                    if not self.left.wait(REACTION_SECONDS):
                        self._end_process(service)
                    return

    def _end_process(self, service: Service) -> None:
        """Do what the main thread, which is stuck in Ray, cannot do any more."""
        for tell in _tellers:
            with suppress(Exception):  # the message matters more
                tell()
        self._kill()
        time.sleep(SENDING_SECONDS)
        sys.stderr.write(f"drtune-ray: {service.end()}\n")
        sys.stderr.flush()
        os._exit(EnvironmentProblem.exit_code)
