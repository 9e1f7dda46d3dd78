"""`drtune-ray status`: what it says of a study that runs, was interrupted or is done; it reads."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from drtune_ray.config.study import STUDY, TRAINING, StudyConfig, TrackingConfig
from drtune_ray.display.result import evaluation_lines
from drtune_ray.display.status import overview_lines, status_lines
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.folders import LocalFolder
from drtune_ray.results import trials
from drtune_ray.results.class_tables import class_tables
from drtune_ray.results.evaluation_record import (
    RESULT_NAME,
    WEIGHTS_NAME,
    Accuracy,
    Evaluation,
    write_result,
)
from drtune_ray.space.search_space import read_space
from drtune_ray.storage import driver_lock as driver_lock_module
from drtune_ray.storage.driver_lock import driver_lock
from drtune_ray.storage.fingerprint import open_record
from drtune_ray.storage.lease import LEASE_NAME
from drtune_ray.storage.optuna_storage import open_storage, open_study
from drtune_ray.storage.record import DONE_NAME, find_studies, write_done
from drtune_ray.study import status
from drtune_ray.study.status import (
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_SEEN,
    RUNNING,
    read_status,
)
from drtune_ray.tracking.events import MetricsRecorded, RunFinished, RunStarted, StepsRecorded
from drtune_ray.tracking.spool import Spool
from drtune_ray.values import nested

DRIVER = """
import sys, time
from pathlib import Path
from drtune_ray.storage.driver_lock import driver_lock
with driver_lock(Path(sys.argv[1])):
    print("driving", flush=True)
    time.sleep(60)
"""
SIZES = optuna.distributions.IntDistribution(0, 1)
LR = optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)


class Made:
    """A study's folder as a driver leaves it, without a driver."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        folder.mkdir(parents=True)
        values = {"name": folder.name, "storage": str(folder.parent), "trials": 4}
        values |= {"trial.data.train": "images", "trial.training.epochs": 10}
        self.config = StudyConfig.from_mapping(
            nested(values | {"space": read_space("quick")} | changes)
        )
        plain = self.config.to_mapping()
        self.record = open_record(
            folder, STUDY, plain, {}, self.config.tracking, self.config.artifacts
        )
        self.folder = folder
        self.study = open_study(
            open_storage(folder, self.config.optuna_storage), self.record.study_id
        )

    def trial(self, best: list[float], state: TrialState | None, outcome: str, **more: Any) -> None:
        """A trial with its best accuracy by epoch; it runs where it has no state."""
        trial = self.study.ask({} if "reference" in more else {"optim.backbone_lr": LR})
        values = trial.params or {"optim.backbone_lr": 0.001}
        config = self.config.trial.with_values(values).to_mapping()
        attributes = {trials.CONFIG: json.dumps(config), **more}
        if state is not None:
            attributes[trials.OUTCOME] = outcome
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        for number, value in enumerate(best, 1):
            trial.report(value, number)
        if state is not None:
            self.study.tell(trial, best[-1] if state == TrialState.COMPLETE else None, state=state)

    def three_and_a_running_one(self) -> None:
        self.trial([0.7, 0.85], TrialState.COMPLETE, "completed", reference="default")
        self.trial([0.99], TrialState.PRUNED, "diverged")
        self.trial([0.6, 0.8], TrialState.COMPLETE, "completed")
        self.trial([0.5, 0.6, 0.86], None, "")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    found = Made(tmp_path / "studies" / "flowers")
    found.three_and_a_running_one()
    return found


@contextmanager
def driving(folder: Path) -> Iterator[int]:
    """Another process drives the study; yields its number."""
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "driving\n"
        try:
            yield process.pid
        finally:
            process.kill()


def said(found: status.Status) -> str:
    return "\n".join(status_lines(found, "drtune-ray", now=found.last_sign + 75))


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


# ---- trials


def test_read_status__trials(made: Made) -> None:
    found = read_status("flowers", str(made.folder.parent))
    assert (found.num_done, found.num_trials, found.num_epochs) == (3, 4, 10)
    assert found.outcomes == {"completed": 2, "diverged": 1}
    assert found.best is not None
    assert (found.best.number, found.best.best_val_accuracy) == (3, 0.86)  # the diverged one is not
    assert [trial.label for trial in found.references] == ["0 (default)"]
    assert [(t.number, t.num_epochs) for t in found.unfinished] == [(3, 3)]
    assert found.searched == ("optim.backbone_lr",)
    assert found.num_bytes == sum(p.stat().st_size for p in made.folder.iterdir())


def test_read_status__settings_of_the_best_trial_alone(made: Made) -> None:
    # Another trial had a setting that this one does not use; `ordered` values have longer names.
    found = made.study.ask({"optim.momentum": LR, "method.bank_size [64, 128]": SIZES})
    made.study.tell(found, state=TrialState.FAIL)
    last = made.study.ask({"optim.backbone_lr": LR, "method.bank_size [64, 128]": SIZES})
    values = {"optim.backbone_lr": last.params["optim.backbone_lr"], "method.bank_size": 64}
    config = made.config.trial.with_values(values).to_mapping()
    last.set_user_attr(trials.CONFIG, json.dumps(config))
    last.set_user_attr(trials.OUTCOME, "completed")
    last.report(0.99, 1)
    made.study.tell(last, 0.99)
    found = read_status("flowers", str(made.folder.parent))
    assert found.searched == ("optim.backbone_lr", "optim.momentum", "method.bank_size")
    assert status.best_settings(found) == values


def test_status_lines__a_study_that_was_interrupted(made: Made) -> None:
    found = read_status(str(made.folder), "elsewhere")
    rate = json.loads(made.study.trials[3].user_attrs[trials.CONFIG])["optim"]["backbone_lr"]
    assert said(replace(found, num_bytes=1536)) == "\n".join(
        [
            f"Study 'flowers': {made.folder}",
            "  state             interrupted; last activity 1 min 15 s ago",
            "  trials            3 of 4 done: 2 completed, 1 diverged",
            "  best so far       86.00 %, trial 3, unfinished",
            f"                    optim.backbone_lr = {rate:.3g}",
            "  reference trials  0 (default)      85.00 %  epoch 2/10  completed",
            "  unfinished        3                86.00 %  epoch 3/10",
            "  disk              1.5 KiB",
            "  resume with       repeat the command that started it; its settings are in "
            "study.yaml, under config",
        ]
    )


def test_read_status__changes_nothing(made: Made) -> None:
    with driver_lock(made.folder):
        before = everything(made.folder.parent)
        read_status("flowers", str(made.folder.parent))
        assert everything(made.folder.parent) == before


def test_read_status__before_the_first_trial(made: Made) -> None:
    (made.folder / "optuna.journal").unlink()
    found = read_status("flowers", str(made.folder.parent))
    assert (found.trials, found.best, found.state) == ((), None, INTERRUPTED)
    assert not (made.folder / "optuna.journal").exists()
    assert "trials            0 of 4 done\n" in said(found)


def test_read_status__a_line_that_is_being_written_is_for_later(made: Made) -> None:
    with (made.folder / "optuna.journal").open("ab") as journal:
        journal.write(b'{"op_code": 6, "trial')
    assert read_status("flowers", str(made.folder.parent)).num_done == 3


def test_read_status__unknown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^there is no study 'roses' under .*: give its name"):
        read_status("roses", str(tmp_path))


# ---- state


def test_state__running_by_which_process(made: Made) -> None:
    with driving(made.folder) as pid:
        found = read_status("flowers", str(made.folder.parent))
        assert found.state == RUNNING
        text = said(found)
        process = f"process {pid} on {socket.gethostname()}"
        assert f"state             running: {process}; last activity 1 min 15 s ago\n" in text
        assert "  running           3                86.00 %  epoch 3/10\n" in text
        assert time.time() - found.last_sign < 60
    assert read_status("flowers", str(made.folder.parent)).state == INTERRUPTED


@pytest.mark.parametrize("has_list", [True, False])
def test_state__a_number_that_another_process_has_by_now(made, monkeypatch, tmp_path, has_list):
    """Where the kernel does not list its locks, a living process of that number is believed."""
    (made.folder / "driver.lock").touch()
    text = f"process {os.getpid()} on {socket.gethostname()}"
    (made.folder / "driver.txt").write_text(text)
    if not has_list:
        monkeypatch.setattr(driver_lock_module, "LOCKS_FILE", tmp_path / "none")
    found = read_status("flowers", str(made.folder.parent))
    assert found.state == (INTERRUPTED if has_list else RUNNING)


def test_state__on_another_host(made: Made) -> None:
    (made.folder / "driver.txt").write_text("process 7 on elsewhere")
    found = read_status("flowers", str(made.folder.parent))
    assert found.state == NOT_SEEN
    text = "running in process 7 on elsewhere, or killed: this host cannot tell; last activity"
    assert text in said(found)


def test_state__done(made: Made) -> None:
    made.trial([0.7], TrialState.COMPLETE, "completed")
    made.study.tell(made.study.trials[3].number, 0.86)
    found = read_status("flowers", str(made.folder.parent))
    assert found.state == INTERRUPTED  # its winner was not written
    write_done(made.config, 5)
    found = read_status("flowers", str(made.folder.parent))
    assert found.state == DONE
    assert f"test the winner   drtune-ray evaluate {made.folder}" in said(found)
    with driving(made.folder):
        assert read_status("flowers", str(made.folder.parent)).state == RUNNING


def test_status__shows_the_recorded_result_on_the_test_split(made: Made) -> None:
    write_done(made.config, 5)
    weights = made.folder / "winner" / WEIGHTS_NAME
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    tables = class_tables([0, 1, 1], [[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], ["cat", "dog"])
    measured = Evaluation(
        Accuracy(45, 60), Accuracy(50, 60), 50 / 60, 1, 1_700_000_000_000, tables=tables
    )
    write_result(made.folder, weights, measured)
    found = read_status("flowers", str(made.folder.parent))
    assert found.evaluation == replace(measured, is_recorded=True)
    assert "test accuracy     75.00 % (95 % interval 62.77 % to 84.22 %)\n" in said(found)
    assert "evaluate" not in said(found)
    facts = status.facts(found)["evaluation"]
    assert (facts["test"]["num_correct"], facts["test"]["num_images"]) == (45, 60)
    assert "tables" not in facts
    former = json.loads((made.folder / RESULT_NAME).read_text())  # as an earlier version wrote it
    del former["tables"]
    (made.folder / RESULT_NAME).write_text(json.dumps(former))
    again = read_status("flowers", str(made.folder.parent)).evaluation
    assert again == replace(measured, is_recorded=True, tables=None)
    assert "It is of an earlier version, which recorded no class table." in [
        *evaluation_lines(again)
    ]
    weights.write_bytes(b"of another winner")
    found = read_status("flowers", str(made.folder.parent))
    assert found.evaluation is None and "test the winner" in said(found)


def test_overview__a_line_for_each_study(made: Made) -> None:
    storage = str(made.folder.parent)
    assert find_studies(storage) == [made.folder]
    Made(made.folder.with_name("birds"), trials=3)
    found = [read_status(str(folder), storage) for folder in find_studies(storage)]
    now = max(each.last_sign for each in found)
    assert [line.partition("; ")[0] for line in overview_lines(found, now)] == [
        "birds    study         0 of 3 done  best        -  interrupted",
        "flowers  study         3 of 4 done  best  86.00 %  interrupted",
    ]


def test_state__failed(tmp_path: Path) -> None:
    made = Made(tmp_path / "flowers", trials=3)
    for _ in range(3):
        made.trial([], TrialState.PRUNED, "diverged")
    found = read_status("flowers", str(tmp_path))
    assert (found.state, found.best) == (FAILED, None)
    assert "state             ended without a result\n" in said(found)


# ---- MLflow, the command, a training


def test_read_status__events_not_sent(made: Made) -> None:
    spool = Spool(made.folder / "spool")
    for step in (1, 2, 3):
        spool.append(MetricsRecorded(0, step, {"val_accuracy": 0.5}))
    sent = spool.events.next_unsent()
    assert sent is not None
    spool.events.mark_sent(sent[1])
    found = read_status("flowers", str(made.folder.parent))
    assert found.num_unsent == 2
    assert f"2 events not sent yet; send them: drtune-ray sync {made.folder}" in said(found)


def test_command__as_it_was_given(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/drtune-ray", "tune", "--data", "my flowers"])
    monkeypatch.chdir(tmp_path)
    status.write_command(made.folder)
    command = "drtune-ray tune --data 'my flowers'"
    found = read_status("flowers", str(made.folder.parent))
    assert found.command == command
    monkeypatch.chdir("/")
    found = read_status("flowers", str(made.folder.parent))
    assert found.command == f"cd {tmp_path} && {command}"
    assert f"resume with       cd {tmp_path} && {command}" in said(found)


@pytest.mark.parametrize(
    ("metadata", "command"),
    [
        ({"drtune_arguments": '["submit", "my study.yaml"]'}, "drtune-ray submit 'my study.yaml'"),
        ({"job_name": "raysubmit_1"}, "drtune-ray tune study.yaml"),
    ],
)
def test_command__of_a_job(
    made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path, metadata: Any, command: str
) -> None:
    """Its folder is gone when it is over."""
    monkeypatch.setattr(sys, "argv", ["/bin/drtune-ray", "tune", "study.yaml"])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": metadata}))
    status.write_command(made.folder)
    monkeypatch.chdir(tmp_path)
    assert read_status("flowers", str(made.folder.parent)).command == command


def test_a_training(tmp_path: Path) -> None:
    folder = tmp_path / "flowers-train"
    folder.mkdir()
    trial = Made(tmp_path / "other").config.trial.to_mapping()
    open_record(folder, TRAINING, trial, {}, TrackingConfig())
    assert "epochs            0 of 10" in said(read_status("flowers-train", str(tmp_path)))
    spool = Spool(folder / "spool")
    spool.append(RunStarted(None, "flowers-train", {}, {}))
    for step in (1, 2):
        metrics = {"val_accuracy": 0.5, "best_val_accuracy": 0.6 + step / 10}
        spool.append(MetricsRecorded(None, step, metrics))
        spool.append(StepsRecorded(None, step, [{"loss": 1.0}], 5))
    found = read_status("flowers-train", str(tmp_path))
    text = said(found)
    assert (found.state, found.kind) == (INTERRUPTED, "training")
    assert text.startswith("Training 'flowers-train'")
    assert "  epochs            2 of 10\n  best              80.00 %\n" in text
    spool.append(RunFinished(None, "FAIL", "training diverged", {}, {}))
    found = read_status("flowers-train", str(tmp_path))
    assert found.state == FAILED
    assert "epochs            2 of 10, training diverged\n" in said(found)
    spool.append(RunStarted(None, "flowers-train", {}, {}))
    assert read_status("flowers-train", str(tmp_path)).state == INTERRUPTED
    (folder / DONE_NAME).write_text("completed")
    assert read_status("flowers-train", str(tmp_path)).state == DONE


# ---- servers


def database(tmp_path: Path) -> Made:
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    found = Made(tmp_path / "flowers", optuna_storage=url)
    found.three_and_a_running_one()
    return found


def test_database__is_read(tmp_path: Path) -> None:
    made = database(tmp_path)
    before = everything(tmp_path)
    found = read_status("flowers", str(tmp_path))
    assert (found.num_done, found.best and found.best.number) == (3, 3)
    assert everything(tmp_path) == before
    assert not (made.folder / "optuna.journal").exists()


def test_database__that_is_gone_is_not_made(tmp_path: Path) -> None:
    database(tmp_path)
    file = tmp_path / "optuna.db"
    file.unlink()
    with pytest.raises(EnvironmentProblem) as caught:
        read_status("flowers", str(tmp_path))
    assert str(caught.value) == (
        f"optuna_storage='sqlite:///{file}', which holds the trials, cannot be read: there is no "
        f"file {file}"
    )
    assert not file.exists()


def test_database__without_our_tables(tmp_path: Path) -> None:
    database(tmp_path)
    file = tmp_path / "optuna.db"
    file.write_bytes(b"")
    with pytest.raises(EnvironmentProblem, match=r"cannot be read: .*no such table"):
        read_status("flowers", str(tmp_path))
    assert file.read_bytes() == b""


def test_database__needs_the_password_in_the_environment(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:$FLOWERS_PASSWORD@127.0.0.1:1/flowers"
    made = Made(tmp_path / "flowers")
    replace(made.record, config=made.record.config | {"optuna_storage": url}).write()
    with pytest.raises(ConfigError, match="needs the environment variable FLOWERS_PASSWORD"):
        read_status("flowers", str(tmp_path))


def test_database__that_does_not_answer(tmp_path, monkeypatch) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setenv("FLOWERS_PASSWORD", "open-sesame")
    url = "postgresql+psycopg://me:$FLOWERS_PASSWORD@127.0.0.1:1/flowers"
    made = Made(tmp_path / "flowers")
    replace(made.record, config=made.record.config | {"optuna_storage": url}).write()
    with pytest.raises(EnvironmentProblem) as caught:
        read_status("flowers", str(tmp_path))
    assert "FLOWERS_PASSWORD@127.0.0.1:1" in str(caught.value)
    assert "open-sesame" not in str(caught.value)


def with_artifacts(tmp_path: Path) -> tuple[Made, LocalFolder]:
    made = Made(tmp_path / "flowers", artifacts=f"file://{tmp_path}/artifacts")
    return made, LocalFolder(tmp_path / "artifacts" / "flowers")


def test_artifacts__another_machine_drives_it_now(tmp_path: Path) -> None:
    made, files = with_artifacts(tmp_path)
    (made.folder / "driver.txt").write_text(f"process 7 on {socket.gethostname()}")
    assert read_status("flowers", str(tmp_path)).state == INTERRUPTED
    files.write(LEASE_NAME, json.dumps({"host": "elsewhere", "pid": 9, "beat": 3}).encode())
    found = read_status("flowers", str(tmp_path))
    assert (found.state, found.driver) == (NOT_SEEN, "process 9 on elsewhere")
    files.write(LEASE_NAME, b"{}")
    assert read_status("flowers", str(tmp_path)).state == INTERRUPTED
    files.write(LEASE_NAME, b"torn")
    found = read_status("flowers", str(tmp_path))
    assert found.state == INTERRUPTED
    assert f"warning           artifacts='file://{tmp_path}/artifacts' cannot be read" in said(
        found
    )


def test_artifacts__a_driver_elsewhere_that_ended_gave_its_lease_back(tmp_path: Path) -> None:
    made, _ = with_artifacts(tmp_path)
    (made.folder / "driver.txt").write_text("process 7 on elsewhere")
    assert read_status("flowers", str(tmp_path)).state == INTERRUPTED


# ---- the command


def test_command_line__json_in_about_two_seconds_without_ray_and_torch(made: Made) -> None:
    code = (
        "import sys\n"
        "from drtune_ray.cli import cli\n"
        "cli(['status', sys.argv[1], '--json'], standalone_mode=False)\n"
        "print([m for m in ('ray', 'torch', 'mlflow', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made.folder)], capture_output=True, text=True, check=True
    )
    first, modules = done.stdout.splitlines()
    assert modules == "[]"
    found = json.loads(first)
    assert (found["kind"], found["of"], found["state"]) == ("status", "study", INTERRUPTED)
    assert (found["num_done"], found["num_trials"]) == (3, 4)
    assert found["best"]["number"] == 3
    assert found["folder"] == str(made.folder)
    assert [trial["number"] for trial in found["unfinished"]] == [3]
    assert found["seconds_since_last_sign"] >= 0
