"""The Dockerfile: by hadolint, and by what it must not do. It is not built here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.deploy.manifests import DEPLOY, ROOT

DOCKERFILE = DEPLOY / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


def lint(text: str) -> str:
    done = subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_hadolint__nothing_to_object() -> None:
    assert lint(DOCKERFILE.read_text()) == ""


def test_hadolint__objects_to_a_moving_tag() -> None:
    text = DOCKERFILE.read_text().replace("python:${PYTHON}-slim-bookworm", "python:latest")
    assert "DL3007" in lint(text)


def test_images__end_as_a_user_who_is_not_root() -> None:
    for stage in ("mlflow", "drtune-ray"):
        (text,) = re.findall(rf"^FROM base AS {stage}\n(.*?)(?=^FROM|\Z)", _text(), re.M | re.S)
        assert re.findall(r"^USER (\S+)$", text, re.M) == ["1000:1000"]
        assert re.findall(r"^COPY (?!--from)", text, re.M) == []  # of packages only


def test_context__holds_what_the_wheel_is_built_from() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    for line in rules[1:-1]:
        assert line.startswith("!") and (ROOT / line[1:]).exists()
    copied = re.findall(r"^COPY (deploy/\S+) (\S+) (\S+) \./$", _text(), re.M)
    assert copied == [("deploy/requirements.py", "pyproject.toml", "constraints.txt")]


def _text() -> str:
    return DOCKERFILE.read_text()
