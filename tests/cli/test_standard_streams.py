"""A command whose output cannot be written does its work all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Prints more than any buffer holds, as a study does; its work is the file that it writes.
WORK = """
import contextlib, os, sys
from drtune_ray.cli.standard_streams import tolerate_failing_streams
tolerate_failing_streams()
work = open(sys.argv[1], "w")
assert work.fileno() > 2, work.fileno()
for number in range(3000):
    print("trial", number, "of a study that goes on", flush=True)
with contextlib.suppress(OSError):
    os.write(1, b"of another process")
print("a warning", file=sys.stderr)
work.write("done")
"""
SAID = "drtune-ray: the output cannot be written any more (%s); the command continues without it\n"


def worked(tmp_path: Path, redirection: str, **streams: Any) -> tuple[int, str]:
    """Exit code and stderr of the work with its output redirected by a shell."""
    (tmp_path / "work.py").write_text(WORK)
    command = f"exec {sys.executable} {tmp_path}/work.py {tmp_path}/work {redirection}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["sh", "-c", command],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        **streams,
    )
    assert (tmp_path / "work").read_text() == "done"
    return done.returncode, done.stderr


def test_a_reader_that_goes_away(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        code, said = worked(tmp_path, "", stdout=writing)
    finally:
        os.close(writing)
    assert said.replace("a warning\n", "") == SAID % "Broken pipe"
    assert code == 0


def test_a_full_disk(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    code, said = worked(tmp_path, ">/dev/full")
    assert code == 0
    assert said == SAID % "No space left on device" + "a warning\n"


@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full 2>&1"])
def test_closed_streams_and_a_stderr_that_fails(tmp_path, redirection):
    code, said = worked(tmp_path, redirection, stdout=subprocess.DEVNULL)
    assert code == 0
    assert said == ("a warning\n" if redirection == ">&-" else "")
