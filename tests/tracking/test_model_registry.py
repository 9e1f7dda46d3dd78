"""Models in MLflow's registry: once, whatever is sent twice; the champion; loading and serving."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import drtune_ray
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.storage.record import read_record
from drtune_ray.study.registration import model_ready, promote_model
from drtune_ray.tracking.events import ModelReady, RunStarted
from drtune_ray.tracking.mlflow_client import artifacts_folder, default_tracking_uri
from drtune_ray.tracking.mlflow_recorder import MlflowRecorder
from drtune_ray.tracking.model_registry import (
    ACCURACY_TAG,
    METRIC_TAG,
    VALIDATION_TAG,
    VALUE_TAG,
    WEIGHTS_TAG,
)
from drtune_ray.tracking.spool import Spool
from tests import past_studies
from tests.leftovers import free_port
from tests.servers import mlflow_server, wait_until_healthy
from tests.tracking.sending import send_unsent

COUNTER = itertools.count()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study whose model was sent to the storage's own MLflow."""
    folder = past_studies.install(tmp_path_factory.mktemp("registry"))
    Spool(folder / "spool").append(model_ready(folder))
    send_unsent(Spool(folder / "spool"), recorder(folder))
    return folder


def recorder(folder: Path) -> MlflowRecorder:
    storage = folder.parent
    study_id = read_record(folder).study_id
    uri = default_tracking_uri(storage)
    return MlflowRecorder(uri, "drtune-ray", study_id, artifacts_folder(storage))


def client(folder: Path) -> Any:
    import mlflow

    return mlflow.MlflowClient(default_tracking_uri(folder.parent))


def snapshot(folder: Path) -> Any:
    """All that MLflow knows of models."""
    found = client(folder)
    experiments = [each.experiment_id for each in found.search_experiments()]
    return (
        [(v.name, v.version, v.source, v.tags, v.aliases) for v in found.search_model_versions()],
        [(m.model_id, str(m.status), m.tags) for m in found.search_logged_models(experiments)],
        [(m.name, m.aliases) for m in found.search_registered_models()],
    )


def test_register__a_version_under_the_name_of_the_study(study: Path) -> None:
    ((name, version, source, tags, _),), ((model_id, status, _),), _ = snapshot(study)
    assert (name, int(version), source.rsplit("/", 2)[1]) == ("small", 1, model_id)
    assert "READY" in status
    assert tags == model_ready(study).tags
    assert tags.keys() == {WEIGHTS_TAG, ACCURACY_TAG, VALIDATION_TAG}
    found = client(study)
    model = found.get_logged_model(model_id)
    assert model.source_run_id == recorder(study).run_id(None)
    assert not model.metrics  # they would be metrics of the run too, beside those of its epochs
    folder = Path(model.artifact_location.removeprefix("file://"))
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "served_model.py", "model.safetensors", "config.json"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]


def test_register__sent_twice_changes_nothing(study: Path) -> None:
    before = snapshot(study)
    spool = Spool(study / "spool")
    spool.rewind()
    assert send_unsent(spool, recorder(study)) > 1
    spool.append(model_ready(study))
    send_unsent(spool, recorder(study))
    assert snapshot(study) == before


def test_register__after_a_crash_in_the_middle(study: Path, monkeypatch: Any) -> None:
    """Whatever call is the last one of a process: the next one completes the same model."""
    import mlflow

    other = replace(model_ready(study), name=f"crash-{next(COUNTER)}")
    other = replace(other, tags=other.tags | {WEIGHTS_TAG: "f00d"})
    num_models = len(snapshot(study)[1])
    for call in ("log_model_artifacts", "finalize_logged_model", "create_model_version"):
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, call, _crash)
            with pytest.raises(ConnectionError):
                recorder(study).record(other)
    recorder(study).record(other)
    recorder(study).record(other)
    versions, models, _ = snapshot(study)
    assert len([name for name, *_ in versions if name == other.name]) == 1
    assert len(models) == num_models + 1


def _crash(*arguments: object, **options: object) -> None:
    raise ConnectionError


def test_register__a_folder_that_is_gone_is_no_error(study: Path, tmp_path: Path) -> None:
    before = snapshot(study)
    gone = ModelReady(None, str(tmp_path / "gone"), "gone", {WEIGHTS_TAG: "1"})
    recorder(study).record(gone)
    assert snapshot(study) == before


LOSS: dict[str, str | None] = {METRIC_TAG: "log_loss"}


@pytest.mark.parametrize(
    ("former", "own", "is_champion", "reason"),
    [
        (None, {}, True, "there was no champion"),
        ({ACCURACY_TAG: "0.7"}, {ACCURACY_TAG: "0.8"}, True, "version 2 is correct on 80.00% .*70"),
        ({ACCURACY_TAG: "0.8"}, {ACCURACY_TAG: "0.8"}, False, "version 2 is correct on 80.00%"),
        ({ACCURACY_TAG: "0.9"}, {ACCURACY_TAG: "0.8"}, False, "version 1 on 90.00%"),
        ({VALIDATION_TAG: "other"}, {}, False, "not measured on the same validation images"),
        ({}, {ACCURACY_TAG: None}, False, "has no validation accuracy: its final fit"),
        (
            LOSS | {VALUE_TAG: "0.7"},
            LOSS | {VALUE_TAG: "0.6"},
            True,
            "0.6000 and .* 0.7000: log loss",
        ),
        (
            LOSS | {VALUE_TAG: "0.6"},
            LOSS | {VALUE_TAG: "0.7"},
            False,
            "0.7000 and .* 0.6000: log loss",
        ),
        (
            LOSS | {VALUE_TAG: "0.6"},
            {},
            False,
            "version 1 was chosen by log loss .* 2 by validation",
        ),
    ],
)
def test_promote__only_what_beats_the_champion(
    study: Path, former: Any, own: Any, is_champion: bool, reason: str
) -> None:
    name = f"champion-{next(COUNTER)}"
    sent = recorder(study)

    def event(changes: dict[str, str | None], weights: str) -> ModelReady:
        tags = {ACCURACY_TAG: "0.5", VALIDATION_TAG: "same"} | changes | {WEIGHTS_TAG: weights}
        kept = {key: value for key, value in tags.items() if value is not None}
        return replace(model_ready(study), name=name, tags=kept)

    if former is not None:
        sent.record(event(former, f"{name}-1"))
        assert sent.promote(event(former, f"{name}-1")).is_champion
    sent.record(event(own, f"{name}-2"))
    found = sent.promote(event(own, f"{name}-2"))
    assert found.is_champion is is_champion
    assert re.search(reason, found.reason)
    champion = client(study).get_model_version_by_alias(name, "champion")
    assert (str(champion.version) == found.version) is is_champion


def test_promote__what_is_not_registered(study: Path) -> None:
    unknown = replace(model_ready(study), tags={WEIGHTS_TAG: "unknown"})
    with pytest.raises(EnvironmentProblem, match="no version with these weights"):
        recorder(study).promote(unknown)


@pytest.fixture(scope="module")
def champion(study: Path) -> str:
    found = promote_model(study.name, str(study.parent))
    assert (found.uri, found.is_champion) == ("models:/small@champion", True)
    again = promote_model(str(study), str(study.parent))
    assert (again.is_champion, again.reason) == (True, "it is the champion already")
    return found.uri


def test_load__a_champion(study: Path, champion: str, monkeypatch: Any) -> None:
    paths = sorted((study.parents[1] / "images").rglob("*.bmp"))
    own = drtune_ray.load(study).predict(paths)
    assert drtune_ray.load(champion, storage=study.parent).predict(paths) == own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_tracking_uri(study.parent))
    assert drtune_ray.load("models:/small/1").predict(paths) == own
    with pytest.raises(ConfigError, match="models:/none@champion is not in MLflow at sqlite"):
        drtune_ray.load("models:/none@champion")


def test_load__from_a_storage_that_was_moved(study: Path, champion: str, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(study.parent, moved)
    shutil.move(study.parent / "mlartifacts", study.parent / "away")
    try:
        model = drtune_ray.load(champion, storage=moved)
    finally:
        shutil.move(study.parent / "away", study.parent / "mlartifacts")
    assert model.about == drtune_ray.load(study).about


def test_pyfunc__takes_base64_bytes_and_pixels(study: Path, champion: str) -> None:
    """As MLflow loads it: what it serves is tested below."""
    import mlflow
    import pandas as pd

    path = sorted((study.parents[1] / "images").rglob("*.bmp"))[0]
    content, pixels = path.read_bytes(), np.asarray(Image.open(path))
    (own,) = drtune_ray.load(study).predict(path)
    mlflow.set_tracking_uri(default_tracking_uri(study.parent))
    try:
        model = mlflow.pyfunc.load_model(champion)
    finally:
        mlflow.set_tracking_uri(None)
    values = [base64.b64encode(content).decode(), content, pixels, pixels.tolist()]
    for value in values:
        found = model.predict(pd.DataFrame({"image": [value]}))
        assert found["label"].tolist() == [own.label]
        assert found["probabilities"][0] == pytest.approx(own.probabilities, abs=1e-6)
    for value in (str(path), "####", b"no image", [[1.5]], [[300]], {"a": 1}):
        with pytest.raises(mlflow.MlflowException):
            model.predict(pd.DataFrame({"image": [value]}))


@pytest.mark.slow
def test_a_server__and_nothing_in_the_current_folder(
    study: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """MLflow's default is a database in the current folder, which one call too many would make."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    event = replace(model_ready(study), name="flowers")
    with mlflow_server(tmp_path / "server") as address:
        of_server = MlflowRecorder(address, "drtune-ray", read_record(study).study_id)
        of_store = recorder(study)
        for each in (of_server, of_store):
            each.record(RunStarted(None, "flowers", {}, {}, 1000))
            each.record(event)
            assert each.promote(event).is_champion
        champion = "models:/flowers@champion"
        stores = (address, default_tracking_uri(study.parent))
        models = [drtune_ray.load(champion, tracking_uri=uri) for uri in stores]
    assert [model.about for model in models] == [drtune_ray.load(study).about] * 2
    assert not list(here.iterdir())


@contextmanager
def served(uri: str, folder: Path) -> Iterator[str]:
    """`mlflow models serve` of a model."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", uri]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    variables = {
        "MLFLOW_TRACKING_URI": default_tracking_uri(folder.parent),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # has uvicorn
    }
    with (folder / "served.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | variables,
            cwd=folder,
            start_new_session=True,
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


def answer(address: str, body: Any) -> Any:
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as found:
        return json.load(found)["predictions"]


@pytest.mark.slow
def test_mlflow_models_serve__answers_base64_and_pixels(study: Path, champion: str) -> None:
    paths = sorted((study.parents[1] / "images").rglob("*.bmp"))[::8]
    own = drtune_ray.load(study).predict(paths)
    with served(champion, study) as address:
        texts = [{"image": base64.b64encode(path.read_bytes()).decode()} for path in paths]
        arrays = [[np.asarray(Image.open(path)).tolist()] for path in paths]
        for body in (
            {"dataframe_records": texts},
            {"dataframe_split": {"columns": ["image"], "data": arrays}},
        ):
            for found, wanted in zip(answer(address, body), own, strict=True):
                assert found["label"] == wanted.label
                assert found["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-4)
        with pytest.raises(urllib.error.HTTPError) as refused:
            answer(address, {"dataframe_records": [{"image": "/etc/passwd"}]})
        assert refused.value.code == 400


def test_a_dead_server_costs_only_delay(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(study, folder)
    spool = Spool(folder / "spool")
    late = replace(model_ready(folder), name="late")
    spool.append(RunStarted(None, "late", {}, {}))
    spool.append(late)
    dead = MlflowRecorder("http://127.0.0.1:9", "drtune-ray", "late")
    with pytest.raises(Exception, match="127.0.0.1"):
        send_unsent(spool, dead)
    assert spool.num_unsent() == 2
    assert send_unsent(spool, recorder(study)) == 2
    assert len([v for v in snapshot(study)[0] if v[0] == "late"]) == 1
