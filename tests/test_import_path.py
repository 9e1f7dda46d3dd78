from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drtune_ray.import_path import ROOT, leave_out_current_folder, own_paths
from tests.strays import plant


@pytest.mark.parametrize("entries", ["", ":", ".:"])
def test_command__modules_of_the_current_directory_are_not_run(
    tmp_path: Path, entries: str
) -> None:
    """`python -m` and an empty entry of PYTHONPATH put it before everything."""
    done = subprocess.run(
        [sys.executable, "-m", "drtune_ray", "--version"],
        cwd=plant(tmp_path / "here", ["click", "logging", "json"]),
        env=os.environ | {"PYTHONPATH": entries + ROOT},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_leave_out_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":/other:.:relative")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), "/other", "relative", sys.prefix])
    leave_out_current_folder()
    assert sys.path == ["/other", "relative", sys.prefix]
    assert os.environ["PYTHONPATH"] == "/other:relative"


def test_leave_out_current_folder__what_is_there_for_a_reason_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    leave_out_current_folder()
    assert sys.path == [str(tmp_path)]
    monkeypatch.chdir(ROOT)  # a checkout
    monkeypatch.setattr(sys, "path", [ROOT])
    leave_out_current_folder()
    assert sys.path == [ROOT]


def test_own_paths__without_what_python_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    site = f"{sys.prefix}/lib/site-packages"
    monkeypatch.setattr(
        sys, "path", ["", str(tmp_path), "/shared/checkout", site, f"{sys.prefix}2"]
    )
    assert own_paths() == ["/shared/checkout", f"{sys.prefix}2"]
