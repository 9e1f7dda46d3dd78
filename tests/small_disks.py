"""Disks that fill up: a limit of this process, and a small file system of its own."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond a size: what does not fit is cut off, then refused."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def run_on_small_disk(folder: Path, size: str, script: str) -> str:
    """Run a Python script with a small file system mounted at a folder; return its output."""
    mount = f"mount -t tmpfs -o size={size} none {folder}"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount]).returncode:
        pytest.skip("this machine does not let tests mount a file system")
    command = f'{mount} && "$0" "$@"'
    arguments = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run([*unshare, command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
