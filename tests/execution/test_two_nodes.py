"""Nodes that die, are drained, or join: on a Ray cluster of several nodes on this machine."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from drtune_ray.execution.ray_train import trainer
from drtune_ray.execution.ray_tune.run import MAX_MACHINE_FAILURES
from drtune_ray.study.training_run import TrainingResult, run_training
from drtune_ray.values import to_yaml
from tests import leftovers
from tests.leftovers import free_port
from tests.small import small_trial, small_values, write_coloured
from tests.survival import Killed, kill

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

RAY = str(Path(sys.executable).with_name("ray"))


class Joined(Killed):
    """A study on a cluster that lives longer than it does."""

    def processes(self) -> dict[int, bytes]:
        """Of this study, without what Ray keeps for the next one."""
        found = super().processes()
        actors = (b"ray::RayTrainWorker", b"ray::TrainController", b"ray::ImplicitFunc")
        return {p: title for p, title in found.items() if title.startswith(actors)}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs for trials; its processes take orders, as those of `Killed` do."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("SABOTAGE", str(tmp_path / "orders"))
    monkeypatch.setenv("SABOTAGE_STEP_SECONDS", "0.1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "sabotage"))
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    made = Cluster(initialize_head=True, head_node_args=head)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    ray.init(made.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def joined_study(killed: Any, num_workers: int, *, trials: int = 1, num_epochs: int = 8) -> Joined:
    study: Joined = killed(kind=Joined, trials=trials)
    study.values["trial"]["training"] |= {
        "workers": num_workers,
        "epochs": num_epochs,
        "batch_norm": "frozen" if num_workers > 1 else "local",
    }
    study.file.write_text(to_yaml(study.values))
    return study


def drain(address: str, node: Any) -> None:
    command = [RAY, "drain-node", "--address", address, "--node-id", node.node_id]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    deadline = ["--deadline-remaining-seconds", "60"]
    subprocess.run([*command, *reason, *deadline], check=True, capture_output=True)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_node_is_lost(cluster, killed, num_workers):
    """One resident trial on each of two nodes, or one trial of two workers on both."""
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    study = joined_study(killed, num_workers, trials=3 - num_workers)
    driver = study.start()
    study.wait_for(lambda: study.num_trained() > 1, "training", 90)
    lost = time.monotonic()
    cluster.remove_node(nodes[1], allow_graceful=False)
    if num_workers == 2:
        cluster.add_node(num_cpus=1)
    before = study.num_trained("step")
    study.wait_for(lambda: study.num_trained("step") > before + 4, "going on", 120)
    output = study.finish(driver)
    print(f"the study took {time.monotonic() - lost:.0f} s from the loss to its end")
    assert output.count("goes on from its last save") == 1
    study.check(num_lost=1)
    leftovers.assert_cluster_is_empty()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_drained_node_is_left_after_a_save(cluster, killed, num_workers):
    """It is no failure: more drains than failures are forgiven."""
    nodes = [cluster.add_node(num_cpus=1) for _ in range(num_workers)]
    study = joined_study(killed, num_workers, num_epochs=40)
    driver = study.start()
    for _ in range(MAX_MACHINE_FAILURES + 1 if num_workers == 1 else 1):
        before = study.num_trained()
        study.wait_for(lambda n=before: study.num_trained() > n + 1, "training", 90)
        drain(cluster.address, nodes[-1])
        nodes.append(cluster.add_node(num_cpus=1))
    before = study.num_trained()
    study.wait_for(lambda: study.num_trained() > before, "training on", 90)
    study.hurry()
    output = study.finish(driver)
    steps = study.trained("step")
    print("steps trained twice:", sum(steps.values()) - len(steps))
    assert sum(steps.values()) == len(steps)
    if num_workers > 1:  # Ray Train did it without Tune
        assert "goes on from its last save" not in output
    study.check(num_lost=0)
    leftovers.assert_cluster_is_empty()


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.chaos) for n in (1, 2))])
def test_the_driver_of_a_study_of_several_workers_is_killed(cluster, killed, seed):
    """The study goes on with another number of workers: that of its configuration now."""
    moments = random.Random(seed)
    cluster.add_node(num_cpus=3)
    study = joined_study(killed, 2)
    driver = study.start()
    num_epochs = moments.randrange(4)
    study.wait_for(lambda: study.num_trained() > num_epochs, "training", 90)
    time.sleep(moments.uniform(0, 0.5))
    kill(driver.pid)
    assert driver.wait() == -signal.SIGKILL
    leftovers.assert_cluster_is_empty()
    study.values["trial"]["training"]["workers"] = 3
    study.file.write_text(to_yaml(study.values))
    driver = study.start()
    study.wait_for(lambda: len(leftovers.actor_pids("RayTrainWorker")) == 3, "three workers", 90)
    study.finish(driver)
    study.check(num_lost=1)
    leftovers.assert_cluster_is_empty()


class Elastic:
    """`drtune-ray train` with one to two workers, and what is seen of them meanwhile.

    Args:
        folder: For everything.
        weights_file: The fixture.
        monkeypatch: Makes Ray Train look often for more workers.
    """

    def __init__(
        self, folder: Path, weights_file: Any, monkeypatch: pytest.MonkeyPatch, num_epochs: int
    ) -> None:
        monkeypatch.setattr(trainer, "RESIZE_SECONDS", 5.0)
        (folder / "orders").mkdir()
        values = small_values(write_coloured(folder / "images"), weights_file)
        values |= {"training.workers": [1, 2], "training.epochs": num_epochs}
        self.study = Killed.__new__(Killed)
        self.study.orders, self.study.log = folder / "orders", folder / "log"
        self.study.log.touch()
        self.config = small_trial(values)
        self.storage = folder / "storage"
        self.seen: list[int] = []

    def run(self, meanwhile: Callable[[], None]) -> TrainingResult:
        """Train in a thread; `meanwhile` needs the main one, as Ray's nodes do."""
        with ThreadPoolExecutor() as pool:
            training = pool.submit(run_training, self.config, "elastic", self.storage)
            watching = pool.submit(self._watch, training)
            meanwhile()
            watching.result()
            return training.result()

    def _watch(self, training: Future[TrainingResult]) -> None:
        while not training.done():
            count = len(leftovers.actor_pids("RayTrainWorker"))
            if count and (not self.seen or self.seen[-1] != count):
                self.seen.append(count)
            time.sleep(0.1)

    @property
    def num_repeated(self) -> int:
        """Steps that were trained twice."""
        steps = self.study.trained("step")
        return sum(steps.values()) - len(steps)


def test_a_training_grows_when_a_node_joins(cluster, tmp_path, weights_file, monkeypatch):
    elastic = Elastic(tmp_path, weights_file, monkeypatch, 150)
    cluster.add_node(num_cpus=1)

    def join() -> None:
        elastic.study.wait_for(lambda: elastic.study.num_trained() > 3, "training", 90)
        # The training in this process has set a path of its own: the new node's is the fixture's.
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "sabotage"))
        cluster.add_node(num_cpus=1)
        elastic.study.wait_for(lambda: elastic.seen[-1] == 2, "growing", 120)
        elastic.study.hurry()

    result = elastic.run(join)
    print("workers:", elastic.seen, "steps trained twice:", elastic.num_repeated)
    assert result.outcome == "completed"
    assert elastic.seen[0] == 1 and elastic.seen[-1] == 2
    assert elastic.num_repeated <= 8
    assert {epoch for _, epoch, _ in elastic.study.trained()} == set(range(150))
    leftovers.assert_cluster_is_empty()


def test_a_training_shrinks_when_a_node_dies(cluster, tmp_path, weights_file, monkeypatch):
    elastic = Elastic(tmp_path, weights_file, monkeypatch, 30)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def die() -> None:
        elastic.study.wait_for(lambda: elastic.study.num_trained() > 3, "training", 90)
        cluster.remove_node(nodes[1], allow_graceful=False)

    result = elastic.run(die)
    print("workers:", elastic.seen, "steps trained twice:", elastic.num_repeated)
    assert result.outcome == "completed"
    assert max(elastic.seen) == 2 and elastic.seen[-1] == 1
    assert elastic.num_repeated <= 4  # an epoch
    assert {epoch for _, epoch, _ in elastic.study.trained()} == set(range(30))
    leftovers.assert_cluster_is_empty()
