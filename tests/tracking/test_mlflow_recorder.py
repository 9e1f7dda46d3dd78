from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from drtune_ray.config.study import TrackingConfig
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.tracking.events import (
    Event,
    FilesReady,
    Metrics,
    MetricsRecorded,
    RunFinished,
    RunStarted,
    StepsRecorded,
)
from drtune_ray.tracking.mlflow_client import default_tracking_uri, quiet_mlflow
from drtune_ray.tracking.mlflow_recorder import (
    MAX_PARAM_LENGTH,
    METRICS_PER_CALL,
    MlflowRecorder,
    build_recorder,
    ignored_variables,
    marked_name,
)
from drtune_ray.tracking.spool import Spool
from drtune_ray.tracking.views import runs_page
from drtune_ray.tracking.writer import BackgroundWriter
from tests.tracking.sending import send_unsent

COUNTER = itertools.count()


@dataclass(frozen=True)
class Store:
    """A study's part of the store that all tests of this file share."""

    folder: Path
    experiment: str
    study_id: str

    def recorder(self) -> MlflowRecorder:
        """As a new process has one: it remembers nothing."""
        uri = default_tracking_uri(self.folder)
        artifacts = self.folder / "mlartifacts"
        return MlflowRecorder(uri, self.experiment, self.study_id, artifacts)

    @property
    def client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(default_tracking_uri(self.folder))

    def record(self, events: Sequence[Event]) -> None:
        recorder = self.recorder()
        for event in events:
            recorder.record(event)

    def run(self, number: int | None) -> Any:
        run_id = self.recorder().run_id(number)
        assert run_id is not None
        return self.client.get_run(run_id)

    def history(self, number: int | None, key: str) -> list[tuple[int, float, int]]:
        run_id = self.run(number).info.run_id
        found = self.client.get_metric_history(run_id, key)
        return sorted((metric.step, metric.value, metric.timestamp) for metric in found)

    def snapshot(self) -> dict[str, Any]:
        """Everything that the store says of the experiment."""
        client = self.client
        experiment = client.get_experiment_by_name(self.experiment)
        content = {}
        for run in client.search_runs([experiment.experiment_id]):
            run_id = run.info.run_id
            history = {
                key: [
                    (m.step, str(m.value), m.timestamp)
                    for m in client.get_metric_history(run_id, key)
                ]
                for key in run.data.metrics
            }
            info = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time)
            files = [file.path for file in client.list_artifacts(run_id)]
            content[run_id] = (info, run.data.params, run.data.tags, history, files)
        return content


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one SQLite store for the whole session: making it takes seconds."""
    folder = tmp_path_factory.mktemp("storage")
    MlflowRecorder(default_tracking_uri(folder), "first", "study", folder / "a").run_id(None)
    shutil.copy(folder / "mlflow.db", folder / "empty.db")
    return folder


@pytest.fixture
def store(database: Path) -> Store:
    number = next(COUNTER)
    return Store(database, f"experiment {number}", f"flowers-{number:012x}")


@pytest.fixture
def events(tmp_path: Path) -> list[Event]:
    """A study of three trials from its start to its end."""
    (tmp_path / "best.ckpt").write_bytes(b"weights")
    (tmp_path / "winner").mkdir()
    (tmp_path / "winner" / "model.txt").write_text("model")
    (tmp_path / "winner" / "deep").mkdir()
    (tmp_path / "winner" / "deep" / "more.txt").write_text("more")
    return [
        RunStarted(None, "flowers", {"trials": 20, "trial.seed": 0}, {"note": "x"}, 1000),
        RunStarted(0, "trial 0", {"method.bank_size": 64}, {}, 1001),
        RunStarted(1, "trial 1", {"method.bank_size": 128, "long": "x" * 9000}, {}, 1002),
        MetricsRecorded(0, 1, {"val_accuracy": 0.25, "loss": 2.0}, 1003),
        StepsRecorded(0, 1, [{"loss": 3.0, "dr": 0.5}, {"loss": 2.5}], 1003),
        MetricsRecorded(1, 1, {"loss": math.nan, "dr": math.inf}, 1004),
        MetricsRecorded(0, 2, {"val_accuracy": 0.5, "loss": 1.0}, 1005),
        StepsRecorded(0, 3, [{"loss": 2.0}], 1005),
        RunFinished(0, "COMPLETE", "completed", {"best_val_accuracy": 0.5}, {"t": "v"}, 1006),
        RunFinished(1, "PRUNED", "diverged", {}, {}, 1007),
        RunStarted(2, "trial 2", {}, {}, 1008),
        RunFinished(2, "FAIL", "machine failure", {}, {}, 1009),
        FilesReady(0, str(tmp_path / "best.ckpt"), "checkpoint"),
        FilesReady(None, str(tmp_path / "winner"), "winner"),
        RunFinished(None, "COMPLETE", "completed", {"best_val_accuracy": 0.5}, {}, 1010),
    ]


# ---- what is recorded


def test_record__names_params_and_tags(store: Store, events: list[Event]) -> None:
    store.record(events)
    study, first, second = store.run(None), store.run(0), store.run(1)
    assert (study.info.run_name, first.info.run_name) == ("flowers", "trial 0")
    assert study.data.params == {"trials": "20", "trial.seed": "0"}
    assert first.data.params == {"method.bank_size": "64"}
    assert second.data.params == {"method.bank_size": "128", "long": "x" * MAX_PARAM_LENGTH}
    assert study.data.tags["note"] == "x"
    expected = {
        "drtune.study_id": store.study_id,
        "drtune.trial": "0",
        "drtune.state": "COMPLETE",
        "drtune.outcome": "completed",
        "t": "v",
    }
    assert expected.items() <= first.data.tags.items()
    assert study.data.tags["drtune.trial"] == "study"


def test_record__trials_are_nested_below_the_study(store: Store, events: list[Event]) -> None:
    store.record(events)
    parent = store.run(None)
    assert "mlflow.parentRunId" not in parent.data.tags
    for number in range(3):
        assert store.run(number).data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_record__terminal_statuses_and_times(store: Store, events: list[Event]) -> None:
    running = [event for event in events if not isinstance(event, RunFinished)]
    store.record(running)
    assert [store.run(number).info.status for number in (None, 0, 1, 2)] == ["RUNNING"] * 4
    store.record([event for event in events if isinstance(event, RunFinished)])
    found = [store.run(number).info for number in (None, 0, 1, 2)]
    assert [info.status for info in found] == ["FINISHED", "FINISHED", "FINISHED", "FAILED"]
    names = [info.run_name for info in found]
    assert names == ["flowers", "trial 0", "trial [diverged] 1", "trial [failed] 2"]
    assert [info.start_time for info in found] == [1000, 1001, 1002, 1008]
    assert [info.end_time for info in found] == [1010, 1006, 1007, 1009]


def test_record__metrics_by_epoch_and_step(store: Store, events: list[Event]) -> None:
    store.record(events)
    assert store.history(0, "val_accuracy") == [(1, 0.25, 1003), (2, 0.5, 1005)]
    assert store.history(0, "step_loss") == [(1, 3.0, 1003), (2, 2.5, 1003), (3, 2.0, 1005)]
    assert store.history(0, "step_dr") == [(1, 0.5, 1003)]
    assert store.history(0, "best_val_accuracy") == [(0, 0.5, 1006)]
    ((step, value, _),) = store.history(1, "loss")
    assert step == 1
    assert math.isnan(value)
    assert store.history(1, "dr")[0][1] > 1e300  # infinity, as SQLite can hold it


def test_record__artifacts(store: Store, events: list[Event]) -> None:
    store.record(events)
    root = store.folder / "mlartifacts"
    of_trial = root / store.run(0).info.run_id / "artifacts"
    of_study = root / store.run(None).info.run_id / "artifacts"
    assert (of_trial / "checkpoint" / "best.ckpt").read_bytes() == b"weights"
    assert (of_study / "winner" / "deep" / "more.txt").read_text() == "more"


def test_record__many_steps_and_many_params(store: Store) -> None:
    num_steps = METRICS_PER_CALL + 7
    params = {f"path.{k}": k for k in range(250)}
    store.record(
        [
            RunStarted(None, "flowers", params, {}, 1),
            StepsRecorded(None, 1, [{"loss": float(k)} for k in range(num_steps)], 2),
        ]
    )
    assert store.run(None).data.params == {key: str(value) for key, value in params.items()}
    history = store.history(None, "step_loss")
    assert history == [(k + 1, float(k), 2) for k in range(num_steps)]


# ---- sending again changes nothing


def test_record__replaying_everything_twice_changes_nothing(
    store: Store, events: list[Event]
) -> None:
    store.record(events)
    before = store.snapshot()
    assert len(before) == 4
    for _ in range(2):
        store.record(events)
    assert store.snapshot() == before


@pytest.mark.parametrize("cut", [1, 5, 13])
def test_record__killed_driver_sends_some_events_again(
    store: Store, events: list[Event], tmp_path: Path, cut: int
) -> None:
    reference = Store(store.folder, store.experiment + " unbroken", store.study_id)
    reference.record(events)
    store.record(events[:cut])  # killed before the last three were marked
    store.record(events[max(0, cut - 3) :])
    found, expected = store.snapshot(), reference.snapshot()
    parents = "mlflow.parentRunId"

    def comparable(content: dict[str, Any]) -> list[Any]:
        return sorted(
            (
                [info, params, {k: v for k, v in tags.items() if k != parents}, history, files]
                for info, params, tags, history, files in content.values()
            ),
            key=lambda run: str(run[0]),
        )

    assert comparable(found) == comparable(expected)


def test_record__through_the_spool(store: Store, events: list[Event], tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    for event in events:
        spool.append(event)
    assert send_unsent(spool, store.recorder()) == len(events)
    before = store.snapshot()
    assert [run[0][1] for run in before.values()].count("FINISHED") == 3
    spool.rewind()
    assert send_unsent(spool, store.recorder()) == len(events)
    assert store.snapshot() == before


def test_record__two_studies_of_one_experiment_keep_apart(
    store: Store, events: list[Event]
) -> None:
    other = Store(store.folder, store.experiment, store.study_id + "-other")
    store.record(events)
    other.record(events[:2])
    assert len(store.snapshot()) == 6
    assert other.run(0).info.run_id != store.run(0).info.run_id
    assert other.run(0).data.tags["mlflow.parentRunId"] == other.run(None).info.run_id
    assert other.recorder().run_id(1) is None


# ---- going on after an interruption


def test_record__interrupted_study_goes_on_in_the_same_runs(
    store: Store, events: list[Event]
) -> None:
    store.record(events[:4])
    store.record(
        [
            RunFinished(0, "INTERRUPTED", "interrupted", {}, {}, 1100),
            RunFinished(None, "INTERRUPTED", "interrupted", {}, {}, 1101),
        ]
    )
    assert [store.run(number).info.status for number in (0, None)] == ["KILLED", "KILLED"]
    before = set(store.snapshot())
    store.record([RunStarted(None, "flowers", {"trials": 20, "trial.seed": 0}, {}, 1200)])
    assert store.run(None).info.status == "RUNNING"
    store.record(events[4:])
    assert before < set(store.snapshot())
    assert len(store.snapshot()) == 4
    assert store.run(None).data.tags["drtune.state"] == "COMPLETE"
    assert store.run(0).info.status == "FINISHED"


def test_record__resumed_with_more_trials(store: Store, events: list[Event]) -> None:
    # BUG found: MLflow refuses to change a parameter ("Changing param values is not allowed"), so
    # after the budget, storage, tracking or resources of a study changed, which DESIGN.md allows,
    # its RunStarted is refused for ever and no later event is sent either.
    store.record(events[:2])
    store.record(
        [
            RunStarted(None, "flowers", {"trials": 40, "trial.seed": 0}, {}, 1200),
            MetricsRecorded(0, 3, {"val_accuracy": 0.75}, 1201),
        ]
    )
    assert store.history(0, "val_accuracy") == [(3, 0.75, 1201)]
    assert store.run(None).info.status == "RUNNING"


def test_record_metrics__is_as_one_by_one(store: Store, tmp_path: Path) -> None:
    """Of several runs, with a run that does not exist yet, and with one that MLflow refuses."""
    metrics: list[Metrics] = [
        MetricsRecorded(0, 1, {"val_accuracy": 0.5, "loss": 1.0}, 1001),
        MetricsRecorded(1, 1, {"val_accuracy": 0.25}, 1002),
        StepsRecorded(0, 1, [{"loss": 2.0}, {"loss": 1.0}], 1003),
        MetricsRecorded(0, 2, {"val_accuracy": 0.75}, 1004),
        MetricsRecorded(0, 3, {"not/../allowed": 0.5}, 1005),
        MetricsRecorded(1, 2, {"val_accuracy": 0.5}, 1006),
        MetricsRecorded(7, 1, {"loss": 1.0}, 1007),
    ]
    single = Store(store.folder, store.experiment + " single", store.study_id)
    starts: list[Event] = [
        RunStarted(number, f"trial {number}", {}, {}, 1000) for number in (None, 0, 1)
    ]
    single.record([*starts, *metrics])
    store.record(starts)
    for _ in range(2):
        store.recorder().record_metrics(metrics)

    def histories(of: Store) -> list[Any]:
        return sorted((run[0][0], sorted(run[3].items())) for run in of.snapshot().values())

    assert histories(store) == histories(single)
    assert store.history(0, "val_accuracy") == [(1, 0.5, 1001), (2, 0.75, 1004)]


# ---- failures that the spool waits out


def test_record__a_run_whose_start_was_lost_is_made_bare(store: Store) -> None:
    """A deleted store or an event lost to a full disk must not hold up what comes behind."""
    store.record([MetricsRecorded(7, 1, {"loss": 1.0}, 1)])
    run = store.run(7)
    assert run.info.run_name == "trial-0007"
    assert run.data.metrics == {"loss": 1.0}
    assert run.data.tags["mlflow.parentRunId"] == store.run(None).info.run_id


def test_record__unreachable_server_is_told_soon_and_tried_again(store: Store) -> None:
    recorder = MlflowRecorder("http://127.0.0.1:9", store.experiment, store.study_id)
    event = RunStarted(None, "flowers", {}, {}, 1)
    started = time.monotonic()
    with pytest.raises(Exception, match="Connection refused"):
        recorder.record(event)
    assert time.monotonic() - started < 10
    recorder._uri = default_tracking_uri(store.folder)  # the server is back
    recorder.record(event)
    assert store.run(None).info.run_name == "flowers"


# ---- runs and experiments that were deleted


@pytest.fixture
def deleted(store: Store, events: list[Event], tmp_path: Path) -> tuple[Store, Spool, str]:
    """A study that was recorded, and then its experiment was deleted in MLflow's UI."""
    spool = sent(store, events, tmp_path)
    number = store.client.get_experiment_by_name(store.experiment).experiment_id
    store.client.delete_experiment(number)
    spool.append(MetricsRecorded(0, 3, {"val_accuracy": 0.75}, 1101))
    return store, spool, number


def test_deleted_experiment__is_named_with_the_command_that_brings_it_back(deleted) -> None:
    """Case 21: it was retried for ever, for every study of the storage."""
    store, spool, number = deleted
    uri = default_tracking_uri(store.folder)
    said = (
        f"the experiment {store.experiment!r} was deleted in MLflow: bring it back with `mlflow "
        f"experiments restore -x {number}` (MLFLOW_TRACKING_URI={uri}), or record this study in "
        "another one with --set tracking.experiment=NAME"
    )
    with pytest.raises(EnvironmentProblem) as caught:
        send_unsent(spool, store.recorder())
    assert str(caught.value) == said
    assert spool.num_unsent() == 1  # nothing is lost
    store.client.restore_experiment(number)  # as the command does
    assert send_unsent(spool, store.recorder()) == 1
    assert (3, 0.75, 1101) in store.history(0, "val_accuracy")


def test_deleted_experiment__another_one_gets_the_whole_study(deleted, events) -> None:
    store, spool, _ = deleted
    other = Store(store.folder, store.experiment + " other", store.study_id)
    assert send_unsent(spool, other.recorder()) == len(events) + 1
    assert other.run(0).data.params == {"method.bank_size": "64"}
    assert other.run(None).info.status == "FINISHED"


def test_deleted_experiment__while_a_study_runs(store: Store, events: list[Event]) -> None:
    recorder = store.recorder()
    recorder.record(events[0])
    number = store.client.get_experiment_by_name(store.experiment).experiment_id
    store.client.delete_experiment(number)
    with pytest.raises(EnvironmentProblem, match="was deleted in MLflow: bring it back with"):
        for event in events[1:3]:
            recorder.record(event)


@pytest.mark.parametrize("is_new_process", [True, False])
def test_deleted_runs__of_trials_stay_deleted_and_the_study_goes_on(
    store: Store, events: list[Event], caplog: pytest.LogCaptureFixture, is_new_process: bool
) -> None:
    """Case 27: trial 0 came back as a bare run without parameters and metrics."""
    recorder = store.recorder()
    for event in events:
        recorder.record(event)
    runs = {number: store.run(number).info.run_id for number in (None, 0, 1)}
    for run_id in runs.values():
        store.client.delete_run(run_id)
    if is_new_process:
        recorder = store.recorder()
    recorder.record(RunStarted(None, "flowers", {}, {}, 1200))
    recorder.record(RunFinished(0, "COMPLETE", "completed", {}, {}, 1006))  # as a resumed study
    recorder.record(RunStarted(1, "trial 1", {}, {}, 1201))  # it is trained again
    recorder.record(RunStarted(3, "trial 3", {}, {}, 1202))
    stages = {k: store.client.get_run(v).info.lifecycle_stage for k, v in runs.items()}
    assert stages == {None: "active", 0: "deleted", 1: "active"}
    active = store.snapshot()
    assert {run[2]["drtune.trial"] for run in active.values()} == {"study", "1", "2", "3"}
    assert all(run[1] for run in active.values() if run[2]["drtune.trial"] in ("study", "1"))
    assert store.run(3).data.tags["mlflow.parentRunId"] == runs[None]
    assert caplog.text.count("the run of trial 0 was deleted in MLflow and stays deleted") == 1
    assert f"mlflow runs restore --run-id {runs[0]}" in caplog.text


def sent(store: Store, events: list[Event], folder: Path) -> Spool:
    """Return a spool whose events were all sent."""
    spool = Spool(folder / "flowers" / "spool")
    for event in events:
        spool.append(event)
    send_unsent(spool, store.recorder())
    return spool


def test_deleted_run__of_a_study_with_nothing_to_record_stays_deleted(
    store: Store, events: list[Event], tmp_path: Path
) -> None:
    spool = sent(store, events, tmp_path)
    run_id = store.run(None).info.run_id
    store.client.delete_run(run_id)
    assert send_unsent(spool, store.recorder()) == 0
    assert store.client.get_run(run_id).info.lifecycle_stage == "deleted"


def test_deleted_run__of_a_study_whose_next_trial_starts_is_restored(
    store: Store, events: list[Event]
) -> None:
    store.record(events)
    run_id = store.run(None).info.run_id
    store.client.delete_run(run_id)
    store.record([RunStarted(9, "trial 9", {}, {}, 1200)])
    assert store.client.get_run(run_id).info.lifecycle_stage == "active"
    assert store.run(9).data.tags["mlflow.parentRunId"] == run_id


def test_a_store_that_lost_the_study_gets_it_whole(
    store: Store, events: list[Event], tmp_path: Path
) -> None:
    spool = sent(store, events, tmp_path)
    new = Store(tmp_path / "new", store.experiment, store.study_id)
    new.folder.mkdir()
    shutil.copy(store.folder / "empty.db", new.folder / "mlflow.db")
    assert send_unsent(spool, new.recorder()) == len(events)  # as `drtune-ray sync` does
    assert len(new.snapshot()) == 4
    assert new.run(1).data.params["method.bank_size"] == "128"
    assert send_unsent(spool, new.recorder()) == 0


def test_sync_all__restores_what_was_deleted_and_rebuilds_what_is_gone(
    store: Store, events: list[Event], tmp_path: Path
) -> None:
    spool = sent(store, events, tmp_path)
    before = store.snapshot()
    number = store.client.get_experiment_by_name(store.experiment).experiment_id
    store.client.delete_run(store.run(0).info.run_id)
    gone = store.run(1).info.run_id
    store.client.set_tag(gone, "drtune.trial", "gone")  # as `mlflow gc` leaves no trace of it
    store.client.delete_run(gone)
    store.client.delete_experiment(number)
    recorder = store.recorder()
    recorder._restores = True
    spool.rewind()
    assert send_unsent(spool, recorder) == len(events)
    # MLflow restores an experiment with all its runs.
    after = {k: run for k, run in store.snapshot().items() if run[2]["drtune.trial"] != "gone"}
    assert len(after) == len(before) == 4
    named = {run[0][0]: (run[1], run[3], run[4]) for run in before.values()}
    assert {run[0][0]: (run[1], run[3], run[4]) for run in after.values()} == named


def test_record__used_settings_alone_with_their_numbers(store: Store) -> None:
    dataset = {"name": "flowers", "digest": "d" * 64, "source": "/images", "profile": "{}"}
    params = {"method.name": "dr_tune", "method.regularization_weight": "bank_over_batch", "x": 1}
    resolved = {"method.regularization_weight": 16.0}
    replayed = [
        RunStarted(None, "flowers", {}, {"drtune.version": "1"}, 1, dataset, ["a.b"]),
        RunStarted(0, "t000", params, {}, 2, unused=["x"], resolved=resolved),
    ]
    for _ in range(3):
        store.record(replayed)
    run = store.run(0)
    assert run.data.params == {"method.name": "dr_tune", "method.regularization_weight": "16.0"}
    assert run.data.tags["drtune.version"] == "1"
    for number in (None, 0):
        (found,) = store.run(number).inputs.dataset_inputs
        assert (found.dataset.name, found.dataset.digest) == ("flowers", "d" * 36)
    tags = store.client.get_experiment_by_name(store.experiment).tags
    view = json.loads(tags[f"mlflow.sharedViewState.drtune-{store.study_id}"])
    assert view["searchFilter"] == f"tags.`drtune.study_id` = '{store.study_id}'"
    assert "params.`a.b`" in view["selectedColumns"]
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`best_val_accuracy`", False)
    store.record([RunStarted(None, "flowers", {"objectives": ["log_loss"]}, {}, 1)])
    tags = store.client.get_experiment_by_name(store.experiment).tags
    view = json.loads(tags[f"mlflow.sharedViewState.drtune-{store.study_id}"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`best_val_loss`", True)
    assert view["selectedColumns"][0] == "metrics.`best_val_loss`"
    page = runs_page(default_tracking_uri(store.folder), store.experiment, store.study_id)
    assert page.endswith(f"viewStateShareKey=drtune-{store.study_id}")


def test_marked_name__shows_how_a_run_ended() -> None:
    ends = {
        ("COMPLETE", "completed"): "t007 lambda=0.8 rot",
        ("PRUNED", "stopped by the scheduler"): "t007 [pruned] lambda=0.8 rot",
        ("PRUNED", "out of memory"): "t007 [out of memory] lambda=0.8 rot",
        ("FAIL", "process killed"): "t007 [failed] lambda=0.8 rot",
        ("INTERRUPTED", "interrupted"): "t007 [interrupted] lambda=0.8 rot",
    }
    name = "t007 lambda=0.8 rot"
    for (state, outcome), expected in ends.items():
        name = marked_name(name, RunFinished(7, state, outcome, {}, {}))
        assert name == expected


def test_an_event_that_mlflow_refuses_holds_back_none_behind_it(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path / "flowers" / "spool")
    spool.append(RunStarted(0, "trial 0", {}, {}, 1))
    spool.append(MetricsRecorded(0, 1, {"no?name": 1.0}, 2))
    spool.append(MetricsRecorded(0, 2, {"loss": 1.0}, 3))
    assert send_unsent(spool, store.recorder()) == 3
    assert store.history(0, "loss") == [(2, 1.0, 3)]
    assert "MLflow refuses metrics_recorded of run 0, which is left out: " in caplog.text


# ---- a storage that was copied or moved


def forget_artifact_stores() -> None:
    """As a new process has it: MLflow keeps them by run."""
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    _artifact_repos_cache.clear()


@pytest.fixture
def recorded(store: Store, events: list[Event], tmp_path: Path) -> Store:
    here = Store(tmp_path / "here", store.experiment, store.study_id)
    here.folder.mkdir()
    shutil.copy(store.folder / "empty.db", here.folder / "mlflow.db")
    here.record(events)
    return here


@pytest.mark.parametrize("is_copied", [True, False])
def test_moved_storage__artifacts_go_to_the_new_place(
    recorded: Store, tmp_path: Path, is_copied: bool
) -> None:
    there = Store(tmp_path / "there (2)", recorded.experiment, recorded.study_id)
    if is_copied:
        shutil.copytree(recorded.folder, there.folder)
    else:
        recorded.folder.rename(there.folder)
    (tmp_path / "more.txt").write_text("more")
    forget_artifact_stores()
    there.record([FilesReady(0, str(tmp_path / "more.txt"), "more")])
    there.record([RunStarted(7, "trial 7", {}, {}), FilesReady(7, str(tmp_path / "more.txt"), "m")])
    for number, names in ((0, {"checkpoint", "more"}), (7, {"m"})):
        info = there.run(number).info
        assert info.artifact_uri.startswith(there.folder.as_uri() + "/mlartifacts/")
        assert {file.path for file in there.client.list_artifacts(info.run_id)} == names
    if is_copied:  # the former place is left alone
        forget_artifact_stores()
        assert recorded.run(0).info.artifact_uri.startswith(recorded.folder.as_uri())
        artifacts = recorded.client.list_artifacts(recorded.run(0).info.run_id)
        assert [file.path for file in artifacts] == ["checkpoint"]
    else:
        assert not recorded.folder.exists()


def test_moved_storage__reached_by_another_path_is_not_moved(
    recorded: Store, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(recorded.folder)
    linked = Store(tmp_path / "link", recorded.experiment, recorded.study_id)
    linked.record([RunFinished(0, "COMPLETE", "completed", {}, {}, 1006)])
    assert recorded.run(0).info.artifact_uri.startswith(recorded.folder.as_uri())


def test_runs_page__of_a_moved_storage_shows_its_artifacts(recorded: Store, tmp_path: Path) -> None:
    recorded.folder.rename(tmp_path / "there")
    forget_artifact_stores()
    uri, artifacts = default_tracking_uri(tmp_path / "there"), tmp_path / "there" / "mlartifacts"
    assert "/runs?" in runs_page(uri, recorded.experiment, recorded.study_id, artifacts)
    there = Store(tmp_path / "there", recorded.experiment, recorded.study_id)
    assert there.client.list_artifacts(there.run(0).info.run_id)


# ---- where it goes


def test_build_recorder__sqlite_in_the_storage_or_a_named_server(tmp_path: Path) -> None:
    embedded = build_recorder(TrackingConfig(), tmp_path, "study")
    assert embedded._uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert embedded._artifacts == tmp_path / "mlartifacts"
    server = build_recorder(
        TrackingConfig(uri="http://mlflow:5000", experiment="mine"), tmp_path, "study"
    )
    assert (server._uri, server._experiment) == ("http://mlflow:5000", "mine")
    assert server._artifacts is None  # the server decides


def test_record__in_a_storage_whose_name_means_something_in_a_uri(tmp_path: Path) -> None:
    storage = tmp_path / "50% of $HOME?"
    recorder = build_recorder(TrackingConfig(), storage, "study")
    recorder.record(RunStarted(None, "study", {}, {}))
    assert (storage / "mlflow.db").stat().st_size > 0
    assert {path.name for path in tmp_path.iterdir()} == {storage.name}


def test_ignored_variables__named_with_what_to_give_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team")
    assert ignored_variables(TrackingConfig()) == (
        "MLFLOW_TRACKING_URI is set but not used: tracking.uri (--tracking-uri) says where the "
        "runs are recorded",
        "MLFLOW_EXPERIMENT_NAME is set but not used: tracking.experiment says where the runs are "
        "recorded",
    )
    given = TrackingConfig(uri="http://mlflow:5000", experiment="mine")
    assert ignored_variables(given) == ()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert len(ignored_variables(TrackingConfig())) == 1


def test_quiet_mlflow__private_and_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    quiet_mlflow()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "true"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"  # the user's own word stands
    assert "MLFLOW_RUN_ID" not in os.environ


def test_module__import_does_not_load_mlflow() -> None:
    code = (
        "import sys, drtune_ray.tracking.mlflow_recorder, drtune_ray.tracking.spool; "
        "print('mlflow' in sys.modules)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == "False\n"


# ---- passwords, and files that are gone


def test_recorder__a_server_that_is_away_does_not_show_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "open/sesame"  # noqa: S105
    monkeypatch.setenv("PW", secret)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = "http://user:$PW@127.0.0.1:9"
    spool = Spool(tmp_path)
    with caplog.at_level("DEBUG"), BackgroundWriter(spool, MlflowRecorder(uri, "e", "s")) as writer:
        writer.emit(MetricsRecorded(None, 1, {"loss": 1.0}))
        assert writer.close(timeout_seconds=1.0) == 1
    assert "API request to http://user:$PW@127.0.0.1:9/" in caplog.text
    recorder = MlflowRecorder(uri, "e", "s")
    for act in (lambda: send_unsent(spool, recorder), lambda: runs_page(uri, "e", "s")):
        with pytest.raises(Exception, match=r"API request to http://user:\$PW@") as caught:
            act()
        shown = "".join(traceback.format_exception(caught.value))
        assert secret not in shown + caplog.text
        assert "open%2Fsesame" not in shown + caplog.text


def test_quiet_mlflow__prints_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow prints the address of a server, as it was connected to, whenever a run ends."""
    from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT as SUPPRESS

    monkeypatch.delenv(SUPPRESS.name, raising=False)
    quiet_mlflow()
    assert SUPPRESS.get()


def test_record__files_that_are_gone(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.record([RunStarted(None, "flowers", {}, {}), FilesReady(None, f"{tmp_path}/a", "winner")])
    assert f"tracking: {tmp_path}/a no longer exists, so it is not copied to MLflow" in caplog.text


def test_record__a_start_that_comes_after_an_end_gives_name_and_tags(store: Store) -> None:
    """A study was interrupted between a trial's proposal and its start, and goes on."""
    store.record(
        [
            RunStarted(None, "study", {}, {}),
            RunFinished(0, "INTERRUPTED", "interrupted", {}, {}),
            RunStarted(0, "trial-0000-default", {"a": 1}, {"drtune.reference": "default"}),
        ]
    )
    run = store.run(0)
    assert run.info.run_name == "trial-0000-default"
    assert run.data.tags["drtune.reference"] == "default"
    assert (run.data.params, run.info.status) == ({"a": "1"}, "RUNNING")
