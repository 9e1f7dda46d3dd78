"""Measure the record of a large study: what an epoch waits, what a trial costs the writer.

    .venv/bin/python benchmarks/tracking.py                 # 200 trials, about three minutes
    .venv/bin/python benchmarks/tracking.py --trials 1000

First, what an epoch waits in its two calls while the thread that sends has a server that answers
at once, after two seconds, refuses, or is away; beside it, what the same lines cost without a
thread that sends.

Then the folder of a study of trials with 50 epochs each is written, and read as `drtune-ray status`
does, before and after its events went through the spool into a new SQLite store of MLflow. The
tables are written, and the first page of the UI's runs is requested as the UI does it: 100 runs, by
accuracy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from report import describe_machine

from drtune_ray.config.study import STUDY, TrackingConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.results import trials as columns
from drtune_ray.results.epochs import write_epochs
from drtune_ray.results.events import run_finished, run_started
from drtune_ray.results.trials import record_value, summaries, write_trials
from drtune_ray.storage.record import JOURNAL_NAME, SPOOL_NAME, Record
from drtune_ray.study.status import read_status
from drtune_ray.tracking.events import Event, MetricsRecorded, RunStarted, StepsRecorded
from drtune_ray.tracking.mlflow_client import default_tracking_uri
from drtune_ray.tracking.mlflow_recorder import MlflowRecorder
from drtune_ray.tracking.spool import Spool
from drtune_ray.tracking.writer import BackgroundWriter, send_events

NUM_EPOCHS, NUM_METRICS, NUM_WAITS = 50, 20, 400
EXPERIMENT, STUDY_ID = "benchmark", "benchmark-000000000000"


class Journal(JournalFileBackend):
    """Optuna's journal file, which is not flushed after each record."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with open(self._file_path, "ab") as file:
            file.writelines(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)


def build_study(folder: Path, num_trials: int) -> optuna.Study:
    """Write the folder of a study of finished trials; return Optuna's study."""
    folder.mkdir()
    values = {"trials": num_trials, "trial": {"training": {"epochs": NUM_EPOCHS}}}
    tracking = TrackingConfig(experiment=EXPERIMENT).model_dump(mode="json")
    Record(folder, STUDY_ID, STUDY, config=values, deciding={}, tracking=tracking).write()
    storage = JournalStorage(Journal(str(folder / JOURNAL_NAME)))
    study = optuna.create_study(direction="maximize", storage=storage, study_name=STUDY_ID)
    config = TrialConfig.from_mapping({"data": {"train": "images"}})
    for number in range(num_trials):
        trial = study.ask()
        trial.suggest_float("method.regularization_weight", 0.05, 4.0, log=True)
        columns.describe(trial, config)
        for epoch in range(1, NUM_EPOCHS + 1):
            record_value(trial, epoch, epoch / NUM_EPOCHS * (1 - 1 / (number + 2)))
        trial.set_user_attr(columns.OUTCOME, "completed")
        study.tell(trial, 1 - 1 / (number + 2))
    return study


def events_of(trial: optuna.trial.FrozenTrial) -> list[Event]:
    """Return the events of a trial."""
    metrics = {f"metric_{k}": 0.5 for k in range(NUM_METRICS)}
    epochs = [
        MetricsRecorded(trial.number, epoch, metrics | {"best_val_accuracy": value})
        for epoch, value in trial.intermediate_values.items()
    ]
    return [run_started(trial), *epochs, run_finished(trial)]


def timed(what: str, act: Callable[[], Any]) -> float:
    """Print how long a call takes; return the seconds of a core."""
    before, cpu = time.perf_counter(), time.process_time()
    act()
    seconds = time.process_time() - cpu
    print(f"{what}: {time.perf_counter() - before:.2f} s ({seconds:.2f} s of a core)", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    num_trials = parser.parse_args().trials
    print(describe_machine("benchmarks/tracking.py"))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        report_waits(storage)
        study = storage / "study"
        frozen = build_study(study, num_trials).get_trials(deepcopy=False)
        spool = Spool(study / SPOOL_NAME)
        spool.append(RunStarted(None, "benchmark", {}, {}))
        waits = []
        for event in (event for trial in frozen for event in events_of(trial)):
            before = time.perf_counter()
            spool.append(event)
            waits.append(time.perf_counter() - before)
        p99 = sorted(waits)[int(0.99 * len(waits))]
        print(f"an event waits {1000 * p99:.2f} ms (99th percentile of {len(waits)})")
        recorder = MlflowRecorder(
            default_tracking_uri(storage), EXPERIMENT, STUDY_ID, storage / "mlartifacts"
        )
        timed("status, nothing sent", lambda: read_status(str(study), ""))
        seconds = timed("the writer, all trials", lambda: send_events(spool, recorder))
        each = 1000 * seconds / num_trials
        print(f"the writer, a trial of {NUM_EPOCHS} epochs: {each:.0f} ms of a core")
        timed("status, all sent", lambda: read_status(str(study), ""))
        timed("trials.parquet", lambda: write_trials(summaries(frozen), storage / "t.parquet"))
        epochs = spool.events.events(MetricsRecorded.kind)
        timed("epochs.parquet", lambda: write_epochs(frozen, epochs, storage / "e.parquet"))
        timed("MLflow's first page of runs", lambda: first_page(storage))


def epoch_waits(emit: Callable[[Event], object]) -> str:
    """Return what an epoch waits in tracking calls, in words, at a hundred epochs a second."""
    metrics = {f"metric_{k}": 0.5 for k in range(NUM_METRICS)}
    waits = []
    for epoch in range(NUM_WAITS):
        before = time.perf_counter()
        emit(MetricsRecorded(0, epoch, metrics))
        emit(StepsRecorded(0, 4 * epoch, [{"loss": 1.0}] * 4, 1))
        waits.append(1000 * (time.perf_counter() - before))
        time.sleep(0.01)
    waits.sort()
    return f"{waits[NUM_WAITS // 2]:.2f} ms (median), {waits[NUM_WAITS * 99 // 100]:.2f} ms (p99)"


class Refusing(ThreadingHTTPServer):
    """A server that answers after a time with a status."""

    daemon_threads = True

    def __init__(self, seconds: float, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.seconds, self.status = seconds, status
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answer(BaseHTTPRequestHandler):
    server: Refusing

    def answer(self) -> None:
        time.sleep(self.server.seconds)
        self.send_error(self.server.status)

    do_GET = do_POST = do_PATCH = answer  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


def report_waits(storage: Path) -> None:
    """Print what an epoch waits beside each kind of server."""
    print("an epoch waits, without sending:", epoch_waits(Spool(storage / "alone").append))
    servers = [(2.0, 503), (0.0, 401), (0.0, 403)]
    addresses = {
        "a store that answers": default_tracking_uri(storage),
        "a server that is away": "http://127.0.0.1:9",
    }
    for seconds, status in servers:
        port = Refusing(seconds, status).server_address[1]
        addresses[f"{status} after {seconds:.0f} s"] = f"http://127.0.0.1:{port}"
    for number, (name, address) in enumerate(addresses.items()):
        recorder = MlflowRecorder(address, "waits", f"waits-{number:012d}", storage / "waits")
        writer = BackgroundWriter(Spool(storage / f"waits-{number}"), recorder)
        print(f"an epoch waits, {name}:", epoch_waits(writer.emit), flush=True)
        writer.close(timeout_seconds=0.1, max_seconds=0.0)


def first_page(storage: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(default_tracking_uri(storage))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = client.search_runs(
        [experiment.experiment_id],
        f"tags.`drtune.study_id` = '{STUDY_ID}'",
        max_results=100,
        order_by=["metrics.`best_val_accuracy` DESC"],
    )
    assert len(found) > 1


if __name__ == "__main__":
    main()
