"""One version of Python, Ray, torch and of the package itself, wherever they stand."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version

from drtune_ray import __version__
from tests.deploy.manifests import DEPLOY, ROOT, kustomized
from tests.deploy.rules_versions import constrained, version_problems

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def test_ray__rayversion_is_what_constraints_hold() -> None:
    assert list(version_problems(kustomized("base"))) == []
    (ranges,) = [line for line in PROJECT["project"]["dependencies"] if line.startswith("ray[")]
    major, minor, _ = constrained("ray").split(".")
    assert ranges == f"ray[default,train,tune]>={major}.{minor},<{major}.{int(minor) + 1}"
    assert version("ray") == constrained("ray")


def test_python__image_is_what_the_package_is_checked_for() -> None:
    (image,) = re.findall(r"^ARG PYTHON=(\d+\.\d+)\.\d+$", DOCKERFILE, re.MULTILINE)
    assert image == PROJECT["tool"]["mypy"]["python_version"]
    assert PROJECT["project"]["requires-python"] == f">={image}"


def test_dockerfile__no_version_but_pythons() -> None:
    code = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    assert re.findall(r"\d+\.\d+[\d.]*", code) == re.findall(r"ARG PYTHON=(\S+)", code)


def test_package__version_in_manifests_and_documents() -> None:
    assert PROJECT["project"]["version"] == __version__
    texts = [DOCKERFILE, (ROOT / "docs" / "kubernetes.md").read_text()]
    texts += [path.read_text() for path in DEPLOY.rglob("*.yaml")]
    tags = {
        tag for text in texts for tag in re.findall(r"drtune-ray(?:-mlflow)?:(\d+\.[\d.]+)", text)
    }
    assert tags == {__version__}


def test_requirements__those_of_pyproject() -> None:
    command = [sys.executable, str(DEPLOY / "requirements.py"), "dependencies", "servers"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    extras = PROJECT["project"]["optional-dependencies"]["servers"]
    assert done.stdout.splitlines() == [*PROJECT["project"]["dependencies"], *extras]
    for package in ("torch", "torchvision", "mlflow", "boto3", "Flask-WTF", "psycopg-binary"):
        assert constrained(package)
