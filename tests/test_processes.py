from __future__ import annotations

import os
import subprocess
import sys

import pytest

from drtune_ray.processes import is_alive


def test_is_alive__this_process() -> None:
    assert is_alive(os.getpid())


def test_is_alive__an_ended_process() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    assert not is_alive(process.pid)


def test_is_alive__a_process_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert is_alive(1)
