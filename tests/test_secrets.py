"""Secrets of a real study, with servers that work and servers that refuse, are found nowhere."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from drtune_ray.config.study import BudgetConfig
from drtune_ray.execution.ray_tune.callbacks import BudgetStopper, StudyCallback
from drtune_ray.execution.ray_tune.searcher import StudySearch
from drtune_ray.folders import Folder, open_folder
from drtune_ray.search.budget import Budget
from drtune_ray.search.outcomes import Outcomes
from drtune_ray.search.proposals import FinalistProposals
from drtune_ray.storage.optuna_storage import open_storage, open_study
from drtune_ray.values import to_yaml
from tests.search.searches import run_context
from tests.servers import BUCKET, database, mlflow_server, object_store_here
from tests.study.test_study import study_values

COMMAND = str(Path(sys.executable).with_name("drtune-ray"))
PLANTED = (
    "DATABASE_PASSWORD",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "SERVER_PASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
)


class Planted:
    """Secrets in the environment of commands, and all that these leave behind.

    Args:
        folder: Of the study and the servers.
        address: Of an object store.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.secrets = {name: secrets.token_hex(32) for name in PLANTED}
        # Ray's sockets have short paths.
        self.sessions = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
        self.folder, self.printed = folder, ""
        self.environment = os.environ | self.secrets
        self.environment |= {
            "AWS_ENDPOINT_URL": address,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_TRACKING_USERNAME": "admin",
            "RAY_AUTH_MODE": "token",
            "RAY_TMPDIR": str(self.sessions),
        }
        self.environment.pop("RAY_ADDRESS", None)

    def run(self, *arguments: str, expected: int, **variables: str) -> None:
        """A command with all of them."""
        done = subprocess.run(
            [COMMAND, *arguments],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=900,
        )
        self.printed += done.stdout + done.stderr
        assert done.returncode == expected, self.printed

    def leaks(self, artifacts: Folder) -> set[str]:
        """Where which secret stands."""
        contents = {"printed": self.printed.encode()}
        for folder in (self.folder, self.sessions):
            files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
            contents |= {str(path): path.read_bytes() for path in files}
        contents |= {artifacts.address(name): artifacts.read(name) for name in artifacts.names()}
        return {
            f"{name} in {place}"
            for place, content in contents.items()
            for name, secret in self.secrets.items()
            # Tune writes pickles in hexadecimal.
            if secret.encode() in content or secret.encode().hex().encode() in content
        }


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    with object_store_here() as store:
        made = Planted(tmp_path, store["AWS_ENDPOINT_URL"])
        yield made
        shutil.rmtree(made.sessions, ignore_errors=True)


def secured_server(planted: Planted, folder: Path) -> Any:
    return mlflow_server(
        folder,
        *("--app-name", "basic-auth"),
        MLFLOW_FLASK_SERVER_SECRET_KEY="k",
        MLFLOW_AUTH_ADMIN_PASSWORD=planted.secrets["MLFLOW_TRACKING_PASSWORD"],
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("servers")
def test_secrets_go_nowhere(planted: Planted, tmp_path: Path, weights_file: Any) -> None:
    place = f"s3://{BUCKET}/secrets"
    artifacts = open_folder(place).below("small")
    values = study_values(tmp_path, weights_file, trials=1, reference_trials=[], artifacts=place)
    values["trial"]["training"]["epochs"] = 2
    file = tmp_path / "study.yaml"
    log = tmp_path / "mlflow" / "log"
    no_ray = (str(file), "--address", "127.0.0.1:9")

    def write(address: str, url: str, name: str = "small") -> None:
        tracking = {"tracking": {"uri": address}, "optuna_storage": url}
        file.write_text(to_yaml(values | tracking | {"name": name}))

    with (
        database(tmp_path.parent / f"{tmp_path.name}-database") as plain,
        secured_server(planted, tmp_path / "mlflow") as mlflow,
    ):
        url = plain.replace(":@", ":$DATABASE_PASSWORD@")
        write(mlflow, url)
        planted.run("doctor", *no_ray, expected=3)
        planted.run("tune", str(file), expected=0)
        # MLflow refuses: once by its login, once by that of its address.
        refusing = mlflow.replace("://", "://admin:$SERVER_PASSWORD@")
        write(mlflow, url, "refused")
        no_login = {"MLFLOW_TRACKING_PASSWORD": planted.secrets["SERVER_PASSWORD"]}
        planted.run("tune", str(file), expected=0, **no_login)
        planted.run("sync", str(tmp_path / "studies" / "refused"), expected=3, **no_login)
        write(refusing, url, "refused")
        planted.run("doctor", *no_ray, expected=3, MLFLOW_TRACKING_USERNAME="")
    # All servers are away.
    away = url.split("@")[0] + "@127.0.0.1:9/none"
    write("http://admin:$SERVER_PASSWORD@127.0.0.1:9", away, "away")
    planted.run("tune", str(file), expected=3)
    planted.run("doctor", *no_ray, expected=3)

    assert planted.leaks(artifacts) == set()
    # The search would see them: in what was printed, in files, and in artifacts.
    for name in ("Best of 1 trials", "cannot be used", "refuses", "does not answer"):
        assert name in planted.printed
    assert log.exists() and list(planted.sessions.glob("ray/session_*/logs/*"))
    (tmp_path / "control").write_text(planted.secrets["RAY_AUTH_TOKEN"])
    artifacts.write("control", planted.secrets["AWS_SESSION_TOKEN"].encode())
    assert planted.leaks(artifacts) == {
        f"RAY_AUTH_TOKEN in {tmp_path}/control",
        f"AWS_SESSION_TOKEN in {artifacts.address('control')}",
    }


def test_what_tune_pickles_holds_no_address(tmp_path: Path) -> None:
    """It lies in the experiment folder as long as a search runs, and after a kill."""
    storage = open_storage(tmp_path, f"sqlite:///{tmp_path}/open-sesame.db")
    study = open_study(storage, "small-1")
    budget = Budget(3, BudgetConfig(), study)
    search = StudySearch(FinalistProposals(study, []), Outcomes(study, budget))
    assert b"open-sesame" in cloudpickle.dumps(study)
    callback = StudyCallback(search, run_context(tmp_path), None)
    for part in (BudgetStopper(budget), search, callback):
        assert b"open-sesame" not in cloudpickle.dumps(part)
