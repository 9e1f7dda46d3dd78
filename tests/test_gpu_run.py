"""`make test-gpu` needs torch, timm, pyarrow, pydantic and pytest, and no other package of ours."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAN = ROOT / "tests" / "lean"
# Trains on a CPU what the tests marked gpu train on a device.
LIKE_A_GPU_TEST = "test_save_points_come_when_asked_and_only_then"


def modules_with_gpu_tests() -> list[str]:
    """Return the test files that hold a test marked gpu."""
    tests = (ROOT / "tests").rglob("test_*.py")
    return sorted(str(path) for path in tests if "\n@pytest.mark.gpu" in path.read_text())


def on_a_lean_machine(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command where only what the GPU tests need can be imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(LEAN), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_gpu_tests__need_neither_ray_nor_mlflow(tmp_path: Path) -> None:
    chosen = f"gpu or {LIKE_A_GPU_TEST}"
    command = [sys.executable, "-m", "pytest", *modules_with_gpu_tests()]
    # Elsewhere pytest would take the rights to its folder from the PostgreSQL server of others.
    options = ["-k", chosen, "-rs", f"--basetemp={tmp_path / 'pytest'}"]
    done = on_a_lean_machine(*command, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d* passed", done.stdout)


@pytest.mark.parametrize("name", ["ray", "mlflow.tracking"])
def test_lean_machine__lacks_the_others(name: str) -> None:
    done = on_a_lean_machine(sys.executable, "-c", f"import {name}")
    assert done.returncode == 1
    assert f"No module named '{name.partition('.')[0]}" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_test_gpu__runs_those_tests_alone() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "test-gpu"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert " -m gpu " in done.stdout
    assert "pip" not in done.stdout
