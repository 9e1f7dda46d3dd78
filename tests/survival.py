"""Studies as real processes that are killed, and what must hold of them afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from drtune_ray.storage.optuna_storage import open_storage, open_study
from drtune_ray.storage.record import read_record
from drtune_ray.values import to_yaml
from tests.strays import plant
from tests.study.test_study import mlflow_runs, study_values

COMMAND = str(Path(sys.executable).with_name("drtune-ray"))
SABOTAGE = Path(__file__).with_name("sabotage")
# How long a test polls for what a busy machine may delay: imports of torch alone, many times over.
LIMIT_SECONDS = 480.0
END_SECONDS = 2 * LIMIT_SECONDS
ACTOR_TITLE = b"ray::ResourceTrainable"
# Processes of a trial of several workers.
WORKER, CONTROLLER, TRIAL_DRIVER = (
    b"ray::RayTrainWorker",
    b"ray::TrainController",
    b"ray::ImplicitFunc",
)
RESUMED = "resumes from its last save"
AGENTS = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")


class Killed:
    """A study in processes of its own, on a Ray of its own.

    Args:
        folder: For images, study and orders.
        weights_file: The fixture.
        environment: Further variables.
        changes: Of the study's values.
    """

    def __init__(
        self,
        folder: Path,
        weights_file: Any,
        *,
        environment: dict[str, str] | None = None,
        **changes: Any,
    ) -> None:
        values = study_values(folder, weights_file, trials=4, reference_trials=[])
        values["trial"]["training"]["epochs"] = 8
        values["scheduler"] = {"name": "none"}
        values |= changes
        self.values = values
        self.file = folder / "study.yaml"
        self.file.write_text(to_yaml(values))
        self.folder = folder / "studies" / "small"
        self.orders = folder / "orders"
        self.orders.mkdir()
        self.log = folder / "log"
        self.cwd = plant(folder / "cwd")
        self.drivers: list[subprocess.Popen[bytes]] = []
        self.command = [COMMAND, "tune", str(self.file)]
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(SABOTAGE),
            "SABOTAGE": str(self.orders),
            **(environment or {}),
        }

    def order(self, *orders: str) -> None:
        """Have processes fail: see ``sabotage/sitecustomize.py``."""
        for order in orders:
            (self.orders / order).touch()

    def write(self, **training: Any) -> None:
        """Write the study's file anew, with these settings of its trials' training."""
        self.values["trial"]["training"] |= training
        self.file.write_text(to_yaml(self.values))

    def hurry(self) -> None:
        """Have steps from now on take no longer than they must, and none be held."""
        (self.orders / "hurry").touch()

    def start(self) -> subprocess.Popen[bytes]:
        """The command, in a session of its own."""
        with self.log.open("a") as sink:
            driver = subprocess.Popen(
                self.command,
                stdout=sink,
                stderr=sink,
                env=self.environment,
                cwd=self.cwd,
                start_new_session=True,
            )
        self.drivers.append(driver)
        return driver

    def end(self) -> None:
        """Kill what is left, of a test that failed."""
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        for pid in self.processes():
            kill(pid)

    def run(self, expected: int = 0, seconds: float = END_SECONDS) -> str:
        """The command to its end; returns all that it and former ones printed."""
        return self.finish(self.start(), expected, seconds)

    def finish(
        self,
        driver: subprocess.Popen[bytes],
        expected: int = 0,
        seconds: float = END_SECONDS,
    ) -> str:
        """Wait for a driver's end."""
        try:
            code = driver.wait(seconds)
        except subprocess.TimeoutExpired:
            driver.kill()
            raise AssertionError(f"the study hangs:\n{self.log.read_text()}") from None
        assert code == expected, self.log.read_text()
        return self.log.read_text()

    def processes(self) -> dict[int, bytes]:
        """All that live of this study's Ray: pid and title."""
        mark = f"SABOTAGE={self.orders}\0".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes()
        return found

    def left(self) -> list[bytes]:
        """Titles of the processes that are left.

        Without Ray's own agents: they see the death of a killed raylet after some seconds, and
        tell the head of it for up to a minute, which may be dead too.
        """
        return [title for title in self.processes().values() if not title.startswith(AGENTS)]

    def actors(self) -> list[int]:
        """Pids of the resident actors."""
        return sorted(p for p, title in self.processes().items() if title.startswith(ACTOR_TITLE))

    def wait_for(
        self, condition: Callable[[], Any], what: str, seconds: float = LIMIT_SECONDS
    ) -> Any:
        """What the condition gives when it is no longer false."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            code = self.drivers[-1].poll() if self.drivers else None
            is_expected = code in (None, 0, 130, -signal.SIGKILL)
            assert is_expected, f"not {what}: exit code {code}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"not {what}:\n{self.log.read_text()}"
            time.sleep(0.02)
        return found

    def trained(self, what: str = "epoch") -> Counter[tuple[Any, ...]]:
        """How often each epoch or step of each trial was trained."""
        path = self.orders / "trained"
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines]
        return Counter(tuple(entry[1:4]) for entry in entries if entry[0] == what)

    def num_trained(self, what: str = "epoch") -> int:
        """How many were trained, repetitions included."""
        return sum(self.trained(what).values())

    def num_repeated(self, what: str = "step") -> int:
        """How often an epoch or step was trained that had been trained before."""
        return sum(count - 1 for count in self.trained(what).values())

    def wait_for_epochs(self, number: int, seconds: float = LIMIT_SECONDS) -> None:
        """Wait until so many more epochs are trained."""
        wanted = self.num_trained() + number
        self.wait_for(lambda: self.num_trained() >= wanted, f"{number} epochs trained", seconds)

    def wait_until_resumed(self, times: int, seconds: float = LIMIT_SECONDS) -> None:
        """Wait until the driver has reported so many failures, and training continues."""
        self.wait_for(lambda: self.log.read_text().count(RESUMED) >= times, "reported", seconds)
        self.wait_for_epochs(1, seconds)

    def trials(self) -> list[Any]:
        """What Optuna holds."""
        study_id = read_record(self.folder).study_id
        return open_study(open_storage(self.folder, None), study_id).get_trials()

    def check(self, num_lost: int, *, states: dict[int, str] | None = None) -> None:
        """All that must hold of a study that has ended, however often it was hit.

        Args:
            num_lost: How many running trials lost their process; each lost an epoch at most.
            states: Of Optuna's trials, where they are not all complete.
        """
        epochs = self.values["trial"]["training"]["epochs"]
        held = self.trials()
        states = states or dict.fromkeys(range(self.values["trials"]), "COMPLETE")
        assert {t.number: t.state.name for t in held} == states
        self._check_mlflow(states)
        self._check_epochs(num_lost, epochs, held)
        self._check_files(states)
        self.wait_for(lambda: not self.left(), "all processes gone", 20)

    def _check_mlflow(self, states: dict[int, str]) -> None:
        client, (parent,), children = mlflow_runs(self.folder)
        assert parent.info.status == "FINISHED", self.log.read_text()
        status = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED"}
        assert sorted(
            (int(run.data.tags["drtune.trial"]), run.info.status) for run in children
        ) == [(number, status[state]) for number, state in sorted(states.items())]
        for run in children:
            history = client.get_metric_history(run.info.run_id, "val_accuracy")
            steps = sorted(metric.step for metric in history)
            assert steps == list(range(1, len(steps) + 1))
            if states[int(run.data.tags["drtune.trial"])] == "COMPLETE":
                assert len(steps) == self.values["trial"]["training"]["epochs"]

    def _check_epochs(self, num_lost: int, epochs: int, held: list[Any]) -> None:
        trained = self.trained()
        assert max(trained.values()) <= 1 + num_lost
        assert sum(count - 1 for count in trained.values()) <= num_lost
        for trial in held:
            if trial.state == TrialState.COMPLETE:
                assert sorted(trial.intermediate_values) == list(range(1, epochs + 1))
                values = json.loads(trial.user_attrs["config"])
                del values["training"]["workers"]
                config = json.dumps(values, sort_keys=True)
                digest = hashlib.sha256(config.encode()).hexdigest()
                assert {e for d, e, _ in trained if d == digest} == set(range(epochs))

    def _check_files(self, states: dict[int, str]) -> None:
        for number, state in states.items():
            trial = self.folder / "trials" / f"{number:05d}"
            files = {path.name for path in trial.iterdir()}
            if state == "FAIL":
                assert files <= {"best.ckpt", "hung.txt"}
            else:
                assert files == {"best.ckpt"}
        hidden = [p for p in self.folder.rglob(".*") if p.name.startswith(".")]
        assert not hidden


class Joined(Killed):
    """A study on a cluster that outlives it.

    Orders reach its processes as the variables of a job do that a job server has started.
    """

    def join(self, address: str) -> None:
        """Have the next drivers join this cluster."""
        names = ("SABOTAGE", "SABOTAGE_STEP_SECONDS")
        variables = {name: self.environment[name] for name in names if name in self.environment}
        variables["PYTHONPATH"] = f"{SABOTAGE}:{Path(__file__).parents[1]}"
        job = {"runtime_env": {"env_vars": variables}}
        self.environment |= {"RAY_ADDRESS": address, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}

    def processes(self) -> dict[int, bytes]:
        """Those of its trials, without what Ray keeps for the next study."""
        found = super().processes()
        titles = (ACTOR_TITLE, WORKER, CONTROLLER, TRIAL_DRIVER)
        return {p: title for p, title in found.items() if title.startswith(titles)}


def kill(pid: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)
