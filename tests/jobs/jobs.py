"""Ray clusters with a token and a job server, in processes of their own, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.leftovers import free_port
from tests.survival import kill

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
SABOTAGE = ROOT / "tests" / "sabotage"
MARK = "DRTUNE_TEST_CLUSTER"


class JobCluster:
    """A cluster of nodes on this machine that asks for a token, and its job server.

    Args:
        folder: For a home, and what the nodes' processes train (`sabotage/sitecustomize.py`).
        variables: Further ones of the nodes.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.token = secrets.token_hex(16)
        self.home = folder / "home"
        (self.home / ".ray").mkdir(parents=True)
        (self.home / ".ray" / "auth_token").write_text(self.token)
        # The paths of sockets are bounded.
        self._temporary = tempfile.mkdtemp(prefix="rj")
        self._gcs, port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{port}"
        self._variables = variables
        self._log = folder / "nodes.log"
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._dashboard = ["--dashboard-port", str(port), "--include-dashboard", "true"]

    def start(self, *cpus: int) -> None:
        """Start a node for each number of CPUs, the first is the head, and wait for them."""
        ports = ["--port", str(self._gcs), "--ray-client-server-port", str(free_port())]
        head = ["--head", *ports, *self._dashboard]
        self._start_node(0, [*head, "--num-cpus", str(cpus[0])])
        self.wait_for(self._is_up, "up")
        for number, count in enumerate(cpus[1:], 1):
            node = ["--address", f"127.0.0.1:{self._gcs}", "--num-cpus", str(count)]
            self._start_node(number, node)
        self.wait_for(lambda: self._num_nodes() == len(cpus), "complete")

    def end(self) -> None:
        """End all processes of the cluster."""
        for node in self._nodes:
            node.terminate()
        for node in self._nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(20)
        for pid in self.processes():
            kill(pid)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def orders(self, node: int = 0) -> Path:
        """Where the processes of a node say what they train, and take orders."""
        return self.folder / f"orders-{node}"

    def num_trained(self, node: int | None = None) -> int:
        """Epochs that were trained on a node or on all, repetitions included."""
        return sum(entry[0] == "epoch" for entry in self.trained(node))

    def trained(self, node: int | None = None) -> list[list[Any]]:
        """What was trained on a node or on all, as ``sitecustomize.py`` writes it."""
        nodes = range(len(self._nodes)) if node is None else [node]
        paths = [self.orders(number) / "trained" for number in nodes]
        lines = [p.read_text().splitlines() for p in paths if p.exists()]
        return [json.loads(line) for of_node in lines for line in of_node]

    def hurry(self) -> None:
        """Have steps from now on take no longer than they must."""
        for number in range(len(self._nodes)):
            (self.orders(number) / "hurry").touch()

    def hold(self, epoch: int) -> None:
        """Have processes wait before this epoch, from 0, or a later one, until `release`."""
        for number in range(len(self._nodes)):
            (self.orders(number) / f"hold@{epoch}").touch()

    def release(self) -> None:
        """Have held processes continue."""
        for number in range(len(self._nodes)):
            for order in self.orders(number).glob("hold@*"):
                order.unlink()

    def user(self, **variables: str) -> dict[str, str]:
        """The environment of a user of the cluster; what belongs to Ray is not set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        kept.pop("RAY_ADDRESS", None)
        return {**kept, "HOME": str(self.home), "PYTHONPATH": str(ROOT), **variables}

    def command(self, name: str, *arguments: str) -> list[str]:
        """A command of drtune-ray on this cluster."""
        return [str(BIN / "drtune-ray"), name, *arguments, "--address", self.address]

    def run(self, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.command(name, *arguments),
            env=self.user(**variables),
            capture_output=True,
            text=True,
            timeout=150,
        )

    def jobs(self, study: str) -> list[dict[str, Any]]:
        """The attempts of a study, as `status` says them."""
        done = self.run("status", study, "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)["jobs"]
        return found

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 900.0) -> Any:
        """What the condition gives when it is no longer false."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not {what}:\n{self._log.read_text()}"
            time.sleep(0.05)
        return found

    def processes(self) -> dict[int, bytes]:
        """All that live of this cluster: pid and title."""
        mark = f"{MARK}={self._temporary}\0".encode()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes()
        return found

    def drivers(self) -> list[int]:
        """Pids of the studies that run as jobs."""
        command = b"drtune-ray\0tune\0study.yaml"
        return [pid for pid, title in self.processes().items() if command in title]

    def _start_node(self, number: int, arguments: list[str]) -> None:
        self.orders(number).mkdir(exist_ok=True)
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments]
        # As on machines of their own: a node writes a job's folder anew below its own path.
        command += ["--temp-dir", f"{self._temporary}/{number}"]
        command += ["--dashboard-agent-listen-port", str(free_port())]
        environment = self.user(
            RAY_AUTH_MODE="token",
            PATH=f"{BIN}:{os.environ['PATH']}",
            PYTHONPATH=f"{SABOTAGE}:{ROOT}",
            SABOTAGE=str(self.orders(number)),
            **{MARK: self._temporary, **self._variables},
        )
        with self._log.open("ab") as log:
            node = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._nodes.append(node)

    def get(self, path: str) -> Any:
        """What the dashboard answers; None where it does not."""
        request = urllib.request.Request(
            f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            return None

    def _is_up(self) -> bool:
        assert self._nodes[0].poll() is None, self._log.read_text()
        return self.get("/api/jobs/") is not None

    def _num_nodes(self) -> int:
        answer = self.get("/nodes?view=summary") or {}
        nodes = answer.get("data", {}).get("summary", [])
        return sum(node["raylet"]["state"] == "ALIVE" for node in nodes)


def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Ctrl-C, and what was printed until the end."""
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=900)
