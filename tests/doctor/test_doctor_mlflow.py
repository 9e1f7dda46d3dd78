"""The doctor of a real MLflow server: logins, host names, files, a clock that is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drtune_ray.doctor.clock_skew import FIX
from drtune_ray.tracking.probe import EXPERIMENT
from tests.servers import mlflow_server, object_store

PASSWORD = "correct-horse"  # noqa: S105
ODD = str(Path(__file__).with_name("odd"))
CHECKS = ("mlflow", "mlflow clock", "mlflow access", "mlflow runs", "mlflow artifacts")


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that asks for a login and knows itself by one host name."""
    folder = tmp_path_factory.mktemp("secured") / "data"
    options = ("--app-name", "basic-auth", "--allowed-hosts", "127.0.0.1:*")
    variables = {"MLFLOW_FLASK_SERVER_SECRET_KEY": "k", "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD}
    with mlflow_server(folder, *options, **variables) as address:
        yield address


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that cannot keep files, and whose clock is an hour ahead."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "file").write_text("is in the way")
    options = ("--artifacts-destination", str(folder / "file" / "artifacts"))
    with mlflow_server(folder / "data", *options, PYTHONPATH=ODD, ODD="clock") as address:
        yield address


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_login(password: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    return set_login


def of_mlflow(found: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    return {check: found[check] for check in CHECKS}


def test_a_server_that_takes_all(secured: str, login: Any, examined: Any, tmp_path: Path) -> None:
    login(PASSWORD)
    found = of_mlflow(examined(storage=str(tmp_path), tracking_uri=secured))
    state, text = found.pop("mlflow clock")
    assert state == "ok"
    assert float(re.fullmatch(r"at most ([\d.]+) s apart", text)[1]) < 2.0
    assert found == {
        "mlflow": ("ok", f"{secured} answers"),
        "mlflow access": ("ok", "host name and login: accepted"),
        "mlflow runs": ("ok", "a run with a metric: accepted"),
        "mlflow artifacts": ("ok", "a file: accepted"),
    }
    import mlflow

    client = mlflow.MlflowClient(secured)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    assert client.search_runs([experiment]) == []


@pytest.mark.parametrize(
    ("password", "said"),
    [
        (None, "requests without a login"),
        ("wrong", "the login from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_a_login_that_is_refused(
    secured: str, login: Any, examined: Any, tmp_path: Path, password: str | None, said: str
) -> None:
    if password:
        login(password)
    found = of_mlflow(examined(storage=str(tmp_path), tracking_uri=secured))
    assert found["mlflow"] == ("ok", f"{secured} answers")
    assert found["mlflow access"] == (
        "failed",
        f"{secured} refuses {said}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
        "MLFLOW_TRACKING_TOKEN, to a login of the server",
    )
    assert found["mlflow runs"] == ("skipped", "needs 'mlflow access', which failed")
    assert found["mlflow artifacts"] == ("skipped", "needs 'mlflow runs', which was skipped")


def test_a_host_name_that_is_refused(
    secured: str, login: Any, examined: Any, tmp_path: Path
) -> None:
    login(PASSWORD)
    uri = secured.replace("127.0.0.1", "localhost")
    found = of_mlflow(examined(storage=str(tmp_path), tracking_uri=uri))
    assert found["mlflow"] == ("ok", f"{uri} answers")
    host = uri.removeprefix("http://")
    assert found["mlflow access"] == (
        "failed",
        f"{uri} refuses the host name that this client sends: start the server with {host} in its "
        "--allowed-hosts",
    )


def test_files_that_are_refused_and_a_wrong_clock(
    broken: str, login: Any, examined: Any, tmp_path: Path
) -> None:
    found = of_mlflow(examined(storage=str(tmp_path), tracking_uri=broken))
    state, text = found["mlflow clock"]
    assert state == "failed"
    assert re.sub(r"3[56]\d\d\.\d s", "3600 s", text) == (
        f"the server's clock is 3600 s ahead of this machine's; {FIX}"
    )
    assert found["mlflow runs"][0] == "ok"
    state, text = found["mlflow artifacts"]
    assert state == "failed"
    assert text.startswith(f"{broken} does not accept a file (")
    assert text.endswith("): check the server's --artifacts-destination, and its log")


def test_runs_that_are_refused(broken: str, login: Any, examined: Any, tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(broken)
    found = client.get_experiment_by_name(EXPERIMENT)
    number = found.experiment_id if found else client.create_experiment(EXPERIMENT)
    client.delete_experiment(number)
    try:
        found = of_mlflow(examined(storage=str(tmp_path), tracking_uri=broken))
    finally:
        client.restore_experiment(number)
    state, text = found["mlflow runs"]
    assert state == "failed"
    assert text.startswith(f"{broken} does not accept a run in the experiment {EXPERIMENT!r} (")
    assert "must be in the 'active' state" in text
    assert text.endswith("): allow this login to create experiments and runs")


def test_no_server(closed_port: str, login: Any, examined: Any, tmp_path: Path) -> None:
    uri = f"http://{closed_port}"
    found = of_mlflow(examined(storage=str(tmp_path), tracking_uri=uri))
    state, text = found.pop("mlflow")
    assert state == "failed"
    assert text.startswith(f"{uri} does not answer (")
    assert "Connection refused" in text
    assert text.endswith("): start the server there, or give another --tracking-uri")
    assert {text for _, text in found.values()} == {
        "needs 'mlflow', which failed",
        "needs 'mlflow access', which was skipped",
        "needs 'mlflow runs', which was skipped",
    }


def test_another_server(login: Any, examined: Any, tmp_path: Path) -> None:
    with object_store() as environment:
        uri = environment["AWS_ENDPOINT_URL"]
        found = of_mlflow(examined(storage=str(tmp_path), tracking_uri=uri))
    assert found["mlflow"] == (
        "failed",
        f"{uri} answers 404 to /health, unlike an MLflow server: check --tracking-uri, including "
        "its path",
    )
