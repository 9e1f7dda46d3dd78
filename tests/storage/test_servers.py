"""A study on servers: PostgreSQL holds the search, S3 the files, MLflow the record; all real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from drtune_ray.config.study import StudyConfig
from drtune_ray.data.remote_tables import RemoteTables
from drtune_ray.data.table_store import TableStore
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.execution.worker_context import WorkerContext
from drtune_ray.folders import LocalFolder, open_folder
from drtune_ray.results import evaluate as evaluate_module
from drtune_ray.results.evaluate import _record_opening, read_openings
from drtune_ray.results.winner import read_winner
from drtune_ray.storage import artifacts, optuna_storage
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.fingerprint import deciding_values
from drtune_ray.storage.optuna_storage import (
    check_storage_of,
    database_as_problem,
    open_storage,
    open_study,
)
from drtune_ray.storage.record import Record, read_record
from drtune_ray.study import run as study_module
from drtune_ray.study.inputs import check_inputs
from drtune_ray.study.resolve import study_request
from drtune_ray.study.tables import prepare
from drtune_ray.tracking.events import MetricsRecorded
from drtune_ray.tracking.spool import Spool
from drtune_ray.training.checkpoint import TrialFolder, read_checkpoint
from drtune_ray.values import nested, to_yaml
from tests.execution.test_actor import actor, run_to_end
from tests.servers import BUCKET, database, mlflow_server, object_store_here
from tests.small import WINNER_FILES, small_trial, small_values, write_coloured

pytestmark = pytest.mark.xdist_group("servers")

SECRET = "open-sesame"
NUM_TRIALS, NUM_EPOCHS = 5, 25


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    with object_store_here():
        yield


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with (
        database(tmp_path_factory.mktemp("database") / "data") as url,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("DATABASE_PASSWORD", SECRET)
        yield url.replace(":@", ":$DATABASE_PASSWORD@")


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow") / "data") as address:
        yield address


# ---- the database


def test_open_storage__postgres_holds_the_search(postgres: str, tmp_path: Path) -> None:
    study = open_study(open_storage(tmp_path, postgres), "flowers-1")
    study.tell(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), 0.5)
    again = open_study(open_storage(tmp_path / "another disk", postgres), "flowers-1")
    assert [trial.value for trial in again.trials] == [0.5]
    assert list(tmp_path.iterdir()) == []


def test_open_storage__password_is_not_set(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_PASSWORD")
    with pytest.raises(ConfigError, match="needs the environment variable DATABASE_PASSWORD"):
        open_storage(tmp_path, postgres)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql+psycopg://u:$DATABASE_PASSWORD@127.0.0.1:9/none", "connection"),
        ("postgresql+psycopg://u@$DATABASE_PASSWORD/none", "$DATABASE_PASSWORD"),
        ("mysql+pymysql://u@127.0.0.1/none", "a package that is not installed"),
    ],
)
def test_open_storage__refused(
    url: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", SECRET)
    with pytest.raises(EnvironmentProblem) as caught:
        open_storage(tmp_path, url)
    assert str(caught.value).startswith(f"optuna_storage={url!r} ")
    assert reason in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "nothing",
        "nodialect://host/none",
        "postgresql+psycopg://u:$DATABASE_PASSWORD@127.0.0.1:1x/none",
        "postgresql+psycopg://u@127.0.0.1:$DATABASE_PASSWORD/none",
    ],
)
def test_open_storage__no_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", SECRET)
    with pytest.raises(ConfigError) as caught:
        open_storage(tmp_path, url)
    message = str(caught.value)
    assert message.startswith(f"optuna_storage={url!r} is not valid: ")
    assert message.endswith(f"; write it like {optuna_storage.EXAMPLE}")
    assert SECRET not in message


def test_database_as_problem__an_error_within_another_of_tune() -> None:
    with pytest.raises(EnvironmentProblem) as caught, database_as_problem("postgresql://db"):
        try:
            raise OperationalError("SELECT 1", {}, OSError("connection refused\nmore"))
        except OperationalError as error:
            try:
                raise StorageInternalError("a commit failed") from error
            except StorageInternalError as internal:
                raise RuntimeError("Tune has a problem") from internal
    assert str(caught.value) == (
        "optuna_storage='postgresql://db' did not do what it was asked ((builtins.OSError) "
        "connection refused): repeat the command when it answers again"
    )
    with pytest.raises(KeyError), database_as_problem(None):
        raise KeyError


def test_database_as_problem__no_password_in_the_message_or_the_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", SECRET)
    url = "postgresql+psycopg://u:$DATABASE_PASSWORD@db/x"
    with pytest.raises(EnvironmentProblem) as caught, database_as_problem(url):
        raise OperationalError("SELECT 1", {}, OSError(f"cannot connect to u:{SECRET}@db"))
    assert "cannot connect to u:$DATABASE_PASSWORD@db" in str(caught.value)
    errors = traceback.format_exception(caught.value)
    assert SECRET not in "".join(line for line in errors if 'f"' not in line)


def test_study_request__flags(tmp_path: Path) -> None:
    write_coloured(tmp_path / "images")
    flags = {
        "data_folder": str(tmp_path / "images"),
        "optuna_storage": "postgresql+psycopg://me:$NAME@host/db",
        "artifacts": "s3://bucket/prefix",
    }
    config, _ = study_request(None, [], flags)
    assert config.optuna_storage == flags["optuna_storage"]
    assert config.artifacts == flags["artifacts"]
    content = deciding_values(config.to_mapping(), "images", "weights")
    assert not {"optuna_storage", "artifacts"} & content.keys()


def record(folder: Path, url: str | None = None, artifacts: str | None = None) -> Record:
    folder.mkdir(parents=True, exist_ok=True)
    made = Record(
        folder, "flowers-1", "study", {"optuna_storage": url}, {}, {}, artifacts=artifacts
    )
    made.write()
    return made


def test_check_storage_of__a_study_does_not_leave_its_trials_behind(tmp_path: Path) -> None:
    former, none = record(tmp_path / "flowers"), StudyArtifacts(None, tmp_path / "flowers")
    url = f"sqlite:///{tmp_path}/search.db"
    storage = open_storage(former.folder, url)
    with pytest.raises(ConfigError) as caught:
        check_storage_of(former, url, storage, none)
    assert str(caught.value) == (
        "study 'flowers' keeps its trials in optuna_storage=none (the study's folder), and "
        f"{url!r} does not hold them: give the former one, or copy the database there first"
    )
    open_study(storage, "flowers-1")  # a copied database
    check_storage_of(former, url, storage, none)


@pytest.mark.parametrize("database", [False, True])
@pytest.mark.parametrize(
    "trace", ["disk/flowers/trials/00000/x", "a/flowers/trials/00000/best.ckpt", "a/flowers/done"]
)
def test_check_storage_of__a_storage_that_was_lost(
    database: bool, trace: str, tmp_path: Path
) -> None:
    """Otherwise all trials would run again, under the numbers and into the runs of the old."""
    url = f"sqlite:///{tmp_path}/search.db" if database else None
    former = record(tmp_path / "disk" / "flowers", url)
    artifacts = artifacts_at(tmp_path / "a", tmp_path / "disk")
    storage = open_storage(former.folder, url)
    # Nothing of a trial: its first run was killed before there was one.
    (former.folder / "trials").mkdir()
    check_storage_of(former, url, storage, artifacts)
    (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / trace).write_text("")
    with pytest.raises(ConfigError) as caught:
        check_storage_of(former, url, storage, artifacts)
    place, lost = ("none (the study's folder)", "the file optuna.journal")
    if database:
        place, lost = repr(url), "the database"
    assert str(caught.value) == (
        f"study 'flowers' has run trials, and optuna_storage={place} does not hold them: their "
        f"settings, values and ends are lost with {lost}, and new trials would be mixed up with "
        f"their checkpoints and MLflow runs. Bring it back from a backup, or give the study "
        "another --name"
    )
    open_study(storage, former.study_id)  # brought back
    check_storage_of(former, url, storage, artifacts)


# ---- files


def artifacts_at(path: Path, disk: Path) -> StudyArtifacts:
    return StudyArtifacts(path.as_uri(), disk / "flowers")


def test_study_artifacts__none_changes_nothing(tmp_path: Path) -> None:
    none = StudyArtifacts(None, tmp_path / "flowers")
    record(tmp_path / "flowers")
    before = sorted(tmp_path.rglob("*"))
    assert (none.trials, none.shelf, none.restore()) == (None, None, False)
    none.keep("study.yaml")
    none.check_lease()
    with none.lease(), none.unsent_kept(Spool(tmp_path / "spool")):
        pass
    assert sorted(p for p in tmp_path.rglob("*") if "spool" not in p.name) == before


def test_study_artifacts__a_lost_disk_comes_back(tmp_path: Path) -> None:
    place, disk = tmp_path / "artifacts", tmp_path / "disk"
    kept = artifacts_at(place, disk)
    assert not kept.restore()
    made = record(disk / "flowers", artifacts=place.as_uri())
    (disk / "flowers" / "winner").mkdir()
    (disk / "flowers" / "winner" / "model.yaml").write_text("classes: []")
    (disk / "flowers" / "done").write_text("5")
    (disk / "splits").mkdir()
    (disk / "splits" / "1.parquet").write_bytes(b"manifest")
    kept.keep("study.yaml", "winner", "done")
    kept.keep_shared(disk / "splits" / "1.parquet")
    with kept.lease():  # is nothing that comes back
        shutil.rmtree(disk)
        again = artifacts_at(place, disk)
        assert again.restore()
    again.restore_shared(disk / "splits" / "1.parquet")
    again.restore_shared(disk / "splits" / "2.parquet")  # there was none
    files = {str(p.relative_to(disk)): p for p in disk.rglob("*") if p.is_file()}
    assert sorted(files) == [
        "flowers/done",
        "flowers/study.yaml",
        "flowers/winner/model.yaml",
        "splits/1.parquet",
    ]
    assert read_record(disk / "flowers") == made
    assert not again.restore()  # it is there


def test_study_artifacts__another_study_of_that_name(tmp_path: Path) -> None:
    artifacts_at(tmp_path / "a", tmp_path / "disk").keep()
    record(tmp_path / "disk" / "flowers", artifacts=(tmp_path / "a").as_uri())
    other = artifacts_at(tmp_path / "b", tmp_path / "disk")
    with pytest.raises(ConfigError) as caught:
        other.restore()
    assert str(caught.value) == (
        f"study 'flowers' keeps its checkpoints in artifacts={(tmp_path / 'a').as_uri()!r}, and "
        f"{(tmp_path / 'b').as_uri()!r} does not hold them: give the former one, or copy the "
        "study's folder there first"
    )
    with pytest.raises(ConfigError, match=r"and none \(the study's folder\) does not hold them"):
        StudyArtifacts(None, tmp_path / "disk" / "flowers").restore()
    other.keep("study.yaml")  # a copied folder
    assert not other.restore()


def test_study_artifacts__nothing_is_kept_for_a_study_that_was_taken_over(tmp_path: Path) -> None:
    kept = artifacts_at(tmp_path / "artifacts", tmp_path / "disk")
    record(tmp_path / "disk" / "flowers")
    kept.check_lease()  # before there is one
    with kept.lease():
        kept.check_lease()
        kept._study.write("driver.json", b'{"pid": 7, "host": "elsewhere", "token": "theirs"}')
        kept._lease.beat()
        for act in (kept.check_lease, lambda: kept.keep("study.yaml")):
            with pytest.raises(EnvironmentProblem, match="was taken over by process 7 on elsewh"):
                act()
    kept.check_lease()
    assert kept._study.names() == ["driver.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
def test_study_artifacts__an_interruption_keeps_the_last_events(
    error: type[BaseException], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, spool = artifacts_at(tmp_path / "a", tmp_path / "disk"), Spool(tmp_path / "spool")
    with pytest.raises(error), kept.unsent_kept(spool):
        spool.append(MetricsRecorded(0, 1, {"loss": 1.0}, 1))
        raise error
    assert b'"step": 1' in _unsent(kept)
    assert caplog.text == ""
    with pytest.raises(error), kept.unsent_kept(spool):
        spool.append(MetricsRecorded(0, 2, {"loss": 1.0}, 1))
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").write_text("the folder went away")
        raise error
    assert "artifacts: artifacts='file://" in caplog.text


def test_study_artifacts__events_that_mlflow_never_took_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "BEAT_SECONDS", 0.05)
    place, disk = tmp_path / "artifacts", tmp_path / "disk"
    kept, spool = artifacts_at(place, disk), Spool(disk / "flowers" / "spool")
    events = [MetricsRecorded(0, epoch, {"loss": 1.0}, epoch) for epoch in range(1, 4)]
    record(disk / "flowers", artifacts=place.as_uri())
    kept.keep("study.yaml")
    spool.append(events[0])
    with pytest.raises(KeyError), kept.unsent_kept(spool):
        spool.events.mark_sent(spool.events.next_unsent()[1])
        for event in events[1:]:
            spool.append(event)
        deadline = time.monotonic() + 10
        while b'"step": 3' not in _unsent(kept):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        raise KeyError  # it is cut off here
    shutil.rmtree(disk)
    assert artifacts_at(place, disk).restore()
    found = Spool(disk / "flowers" / "spool")
    assert found.num_unsent() == 2
    assert found.events.next_unsent()[0] == events[1]
    with kept.unsent_kept(found):
        while unsent := found.events.next_unsent():
            found.events.mark_sent(unsent[1])
    assert _unsent(kept) == b""


def _unsent(kept: StudyArtifacts) -> bytes:
    try:
        return kept._study.read(artifacts.UNSENT_NAME)
    except FileNotFoundError:
        return b""


# ---- nodes


def test_nodes_without_the_drivers_disk_train_and_take_over_from_each_other(
    s3: None, tmp_path: Path, weights_file: Any
) -> None:
    config = small_trial(small_values(write_coloured(tmp_path / "images"), weights_file))
    root, disk = open_folder(f"s3://{BUCKET}/nodes"), tmp_path / "disk"
    shelf = RemoteTables(root.below("cache"))
    with TableStore(disk, 4.0, shelf) as store:
        tables = prepare(check_inputs(config, disk), config, store, "cpu")
    by_key = {config.tables_key: tables.to_mapping()}
    place = WorkerContext(by_key, disk / "trials", 1, "cpu", study_id="s", hang_seconds=60)
    run_to_end(actor(place, 4, config))
    unbroken = TrialFolder(disk / "trials" / "00004").newest()

    place = replace(place, artifacts=root.below("trials"), shelf=shelf)
    shutil.rmtree(disk)
    former = actor(place, 4, config)
    results = [former.step(), former.step()]
    # An epoch's checkpoint is written while the next one trains.
    saved = "epoch-00001-step-0000000.ckpt"
    deadline = time.monotonic() + 60
    while saved not in root.below("trials").below("00004").names():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shutil.rmtree(disk)  # the next node has nothing of what the former one had
    results += run_to_end(actor(place, 4, config))
    assert sorted(path.name for path in disk.rglob("*.ckpt")) == []
    assert [result["epoch"] for result in results] == [1, 2, 2, 3]
    folder = place.folder(4)
    final = folder.newest()
    assert unbroken is not None and final is not None
    tensors = {name: t for name, t in unbroken["method"].items() if torch.is_tensor(t)}
    assert tensors
    for name, tensor in tensors.items():
        assert torch.equal(tensor, final["method"][name]), name
    folder.drop_resumable()
    assert root.below("trials").below("00004").names() == ["best.ckpt"]
    assert read_checkpoint(folder.fetch_best())["record"]["epoch"] >= 1


# ---- the test split


def test_openings_of_the_test_split_outlive_the_disk(tmp_path: Path) -> None:
    disk, artifacts = tmp_path / "disk", LocalFolder(tmp_path / "artifacts")
    disk.mkdir()
    entries = [{"test_split": "a", "model": "flowers", "time_ms": time} for time in (1, 2)]
    for entry in reversed(entries):
        _record_opening(json.dumps(entry), disk, artifacts)
    assert read_openings(disk) == read_openings(disk, artifacts) == entries
    shutil.rmtree(disk)
    assert read_openings(disk) == []
    assert read_openings(disk, artifacts) == entries


def test_openings__only_artifacts_that_fail_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("a file is in the way")
    artifacts = LocalFolder(tmp_path / "artifacts")
    with pytest.raises(EnvironmentProblem) as caught:
        _record_opening("{}", tmp_path, artifacts)
    assert str(caught.value).startswith(f"artifacts='{tmp_path}/artifacts/test-openings' failed (")
    (tmp_path / "test-openings.jsonl").mkdir()
    with pytest.raises(EnvironmentProblem) as caught:
        _record_opening("{}", tmp_path, None)
    assert str(caught.value) == (
        f"{tmp_path}/test-openings.jsonl cannot be written (Is a directory), and an opening of "
        "the test split must be recorded: make it writable"
    )


def test_evaluate__the_splits_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "read_winner", lambda folder: None)
    with pytest.raises(ConfigError, match=r"/splits.parquet is missing, .*: repeat the command"):
        evaluate_module.evaluate(tmp_path, tmp_path / "splits.parquet", tmp_path, tmp_path)


# ---- a whole study


def study_values(folder: Path, weights_file: Any, **changes: Any) -> dict[str, Any]:
    trial = small_values(write_coloured(folder / "images"), weights_file) | {
        "training.batch_norm": "local",
        "optim.backbone_lr": 0.005,
        "training.epochs": NUM_EPOCHS,
    }
    values = {
        "name": "small",
        "storage": str(folder / "disk"),
        "trials": NUM_TRIALS,
        "space": {"parameters": {"optim.backbone_lr": {"float": [0.001, 0.02], "log": True}}},
        "trial": nested(trial),
        "scheduler": {"name": "none"},
        "resources": {"trials_at_a_time": 2},
        "finalists": {"num_seeds": 0},
    }
    return values | changes


def wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def test_losing_the_disk_that_held_the_search_does_not_begin_it_again(
    tmp_path: Path, weights_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "_cluster", lambda config: nullcontext())
    monkeypatch.setattr(study_module, "deciding_values", lambda *of: {})  # as `record` has it
    place = (tmp_path / "artifacts").as_uri()
    kept = open_folder(place).below("small")
    former = record(tmp_path / "lost" / "small", artifacts=place)
    kept.upload(former.folder / "study.yaml", "study.yaml")
    kept.below("trials").below("00000").write("best.ckpt", b"weights")
    config = StudyConfig.from_mapping(study_values(tmp_path, weights_file, artifacts=place))
    for _ in range(2):  # brought back, and there already
        with pytest.raises(ConfigError, match=r"^study 'small' has run trials, "):
            study_module.run_study(config)
    assert kept.names() == ["study.yaml"]


@pytest.mark.ray
@pytest.mark.slow
def test_losing_the_drivers_whole_disk_loses_nothing(
    s3: None, postgres: str, mlflow: str, tmp_path: Path, weights_file: Any
) -> None:
    import mlflow as client_package

    place = f"s3://{BUCKET}/lost-disk"
    values = study_values(tmp_path, weights_file, optuna_storage=postgres, artifacts=place)
    values["tracking"] = {"uri": mlflow}
    file, log = tmp_path / "study.yaml", tmp_path / "log"
    file.write_text(to_yaml(values))
    command = [str(Path(sys.executable).with_name("drtune-ray")), "tune", str(file)]
    disk, artifacts = tmp_path / "disk", open_folder(place).below("small")

    with log.open("w") as sink:
        driver = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
        try:
            wait_for(lambda: (disk / "small" / "study.yaml").exists(), driver, log)
            study_id = read_record(disk / "small").study_id
            storage = open_storage(tmp_path, postgres)
            wait_for(lambda: study_id in optuna.get_all_study_names(storage), driver, log)
            study = open_study(storage, study_id)

            def is_midway() -> bool:
                trials = study.get_trials(deepcopy=False)
                running = [t for t in trials if t.state == TrialState.RUNNING]
                ended = [t for t in trials if t.state == TrialState.COMPLETE]
                return bool(ended) and any(len(t.intermediate_values) >= 5 for t in running)

            wait_for(is_midway, driver, log)
        finally:
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait(timeout=300)
    killed_at = time.time()
    before = study.get_trials()
    shutil.rmtree(disk)

    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was brought back from" in done.stderr
    assert f"Best of {NUM_TRIALS} trials" in done.stdout

    # Nothing that was finished ran again; what was running lost at most one epoch.
    after = study.get_trials()
    assert [trial.number for trial in after] == list(range(NUM_TRIALS))
    assert {trial.state for trial in after} == {TrialState.COMPLETE}
    for old in before:
        if old.state == TrialState.COMPLETE:
            assert after[old.number].datetime_complete == old.datetime_complete
            assert after[old.number].intermediate_values == old.intermediate_values
    client = client_package.MlflowClient(mlflow)
    runs = client.search_runs([client.get_experiment_by_name("drtune-ray").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == NUM_TRIALS + 1
    for run in runs:
        if (number := run.data.tags["drtune.trial"]) == "study":
            continue
        history = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert {metric.step for metric in history} == set(range(1, NUM_EPOCHS + 1))
        known = len(before[int(number)].intermediate_values) if int(number) < len(before) else 0
        again = [m for m in history if m.step <= known and m.timestamp > killed_at * 1000]
        assert len(again) <= 1
        assert run.data.params["optim.backbone_lr"]

    # The winner is on the disk and in artifacts; no orphan checkpoints lie there.
    best = max(after, key=lambda trial: (trial.value or 0.0, -trial.number))
    assert read_winner(disk / "small" / "winner").about["trial"] == best.number
    assert sorted(artifacts.below("winner").names()) == WINNER_FILES
    for number in range(NUM_TRIALS):
        assert artifacts.below("trials").below(f"{number:05d}").names() == ["best.ckpt"]
    assert "driver.json" not in artifacts.names()
    assert "unsent-events.jsonl" not in artifacts.names()

    # The password went nowhere.
    shown = [path.read_bytes() for path in (*tmp_path.rglob("*"), log) if path.is_file()]
    shown += [(done.stdout + done.stderr).encode(), artifacts.read("study.yaml")]
    shown += [str([run.data.params for run in runs]).encode()]
    assert not any(SECRET.encode() in content for content in shown)

    # And the disk may be lost once more: the study is done.
    shutil.rmtree(disk)
    shown_again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "This study is already done; nothing was left to run." in shown_again.stdout
    best_line = next(line for line in done.stdout.splitlines() if "best trial" in line)
    assert best_line in shown_again.stdout
