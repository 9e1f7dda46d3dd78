"""Nodes that die, are drained, or join: on a Ray cluster of several nodes on this machine."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray.util.state import list_actors, list_jobs

from drtune_ray.execution.ray_train import trainer
from drtune_ray.execution.ray_tune.run import MAX_MACHINE_FAILURES
from drtune_ray.study.training_run import TrainingResult, run_training
from tests import leftovers
from tests.clusters import RAY, joined, start_cluster
from tests.leftovers import free_port
from tests.small import small_trial, small_values, write_coloured
from tests.survival import RESUMED, SABOTAGE, Joined, Killed, kill

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.xdist_group("two-nodes"),
]

HELD_EPOCH = 30


class Nodes:
    """Nodes beside a head without CPUs; their processes take orders, as those of `Killed` do."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self.address = cluster.address
        self._cluster, self._nodes = cluster, []
        self._variables = {
            "SABOTAGE": str(folder / "orders"),
            "SABOTAGE_STEP_SECONDS": "0.1",
            "PYTHONPATH": str(SABOTAGE),
        }

    def add(self, num_cpus: int = 1) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._variables.items():
                patch.setenv(name, value)
            self._nodes.append(self._cluster.add_node(num_cpus=num_cpus))

    def lose_last(self) -> None:
        """End the last one without notice."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def replace_last(self) -> None:
        """Add another and drain the last one, as if it were to be taken away."""
        node = self._nodes[-1].node_id
        self.add()
        command = [str(RAY), "drain-node", "--address", self.address, "--node-id", node]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        deadline = ["--deadline-remaining-seconds", "60"]
        subprocess.run([*command, *reason, *deadline], check=True, capture_output=True)

    def end(self) -> None:
        for node in self._nodes:
            self._cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A head without CPUs for trials, which this process has joined."""
    made = start_cluster(num_cpus=0, include_dashboard=True, dashboard_port=free_port())
    try:
        with joined(made.address):
            yield made
    finally:
        made.shutdown()


@pytest.fixture
def nodes(head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    made = Nodes(head, tmp_path)
    try:
        yield made
        leftovers.assert_cluster_is_empty()
    finally:
        made.end()


def joined_study(killed: Any, num_workers: int, **changes: Any) -> Joined:
    study: Joined = killed(kind=Joined, **changes)
    norm = "frozen" if num_workers > 1 else "local"
    study.write(workers=num_workers, epochs=40, batch_norm=norm)
    return study


def last_epochs(study: Killed) -> dict[str, int]:
    """The last epoch that was trained of each trial."""
    found: dict[str, int] = {}
    for digest, epoch, _ in study.trained():
        found[digest] = max(epoch, found.get(digest, 0))
    return found


def wait_until_both_train(study: Killed) -> None:
    """Wait until each trial has trained another epoch, unless it is held."""
    before = last_epochs(study)
    study.wait_for(
        lambda: all(
            epoch > before[digest] or epoch == HELD_EPOCH - 1
            for digest, epoch in last_epochs(study).items()
        ),
        "both trials trained",
    )


def test_a_node_is_lost_and_others_are_drained(nodes, killed):
    """One resident trial on each of two nodes; a drained node is no failure."""
    nodes.add()
    nodes.add()
    study = joined_study(killed, 1, trials=2)
    # The trial that keeps its node must not end while the other one moves.
    study.order(f"hold@{HELD_EPOCH}")
    secret = "do-not-tell"  # noqa: S105
    study.environment |= {"AWS_SECRET_ACCESS_KEY": secret, "OMP_NUM_THREADS": "1"}
    driver = study.start()
    study.wait_for(lambda: len(study.actors()) == 2, "two actors")
    study.wait_for_epochs(2)

    # Workers on both nodes got the variables that they need, and no secret of the driver's.
    actors = list_actors(detail=True, filters=[("state", "=", "ALIVE")])
    assert len({actor.node_id for actor in actors if "Trainable" in actor.class_name}) == 2
    told = repr([actors, list_jobs(detail=True)])
    assert secret not in told
    for name in ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "OMP_NUM_THREADS"):
        assert name in told

    nodes.lose_last()
    nodes.add()
    study.wait_until_resumed(1)
    study.wait_for(lambda: len(study.actors()) == 2, "two actors")
    wait_until_both_train(study)
    assert study.num_repeated("epoch") <= 1
    # As often as a trial may fail: with the node that it lost, once more than that.
    for number in range(MAX_MACHINE_FAILURES):
        nodes.replace_last()
        study.wait_until_resumed(2 + number)
        wait_until_both_train(study)
    num_repeated = study.num_repeated()
    study.hurry()
    study.finish(driver)
    assert study.num_repeated() == num_repeated <= 4  # an epoch, of the node that was lost
    study.check(num_lost=1)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
def test_a_trial_of_several_workers_loses_a_drained_node_another_and_its_driver(
    nodes, killed, seed
):
    """The study then goes on with another number of workers: that of its configuration now."""
    moments = random.Random(seed)
    nodes.add()
    nodes.add()
    study = joined_study(killed, 2, trials=1)
    driver = study.start()
    study.wait_for_epochs(2)

    # Ray Train leaves a drained node without Tune, after a save.
    steps = study.num_trained("step")
    nodes.replace_last()
    workers = leftovers.actor_pids("RayTrainWorker")
    study.wait_for(
        lambda: len(now := leftovers.actor_pids("RayTrainWorker")) == 2 and now != workers,
        "other workers",
    )
    study.wait_for_epochs(2)
    assert study.num_trained("step") > steps and study.num_repeated() == 0
    assert RESUMED not in study.log.read_text()

    lost = time.monotonic()
    nodes.lose_last()
    nodes.add()
    study.wait_until_resumed(1)
    print(f"{time.monotonic() - lost:.0f} s from the loss of a node to the next epoch")
    assert study.num_repeated("epoch") <= 1

    time.sleep(moments.uniform(0, 0.5))
    kill(driver.pid)
    assert driver.wait() == -signal.SIGKILL
    leftovers.assert_cluster_is_empty()
    nodes.add()
    study.write(workers=3)
    driver = study.start()
    study.wait_for(lambda: len(leftovers.actor_pids("RayTrainWorker")) == 3, "three workers")
    study.hurry()
    study.finish(driver)
    study.check(num_lost=2)


class Elastic:
    """`run_training` with one to two workers, and what is seen of them meanwhile.

    Args:
        folder: Holds everything.
        weights_file: The fixture.
        num_epochs: How many it trains.
    """

    def __init__(self, folder: Path, weights_file: Any, num_epochs: int) -> None:
        (folder / "orders").mkdir()
        values = small_values(write_coloured(folder / "images"), weights_file)
        values |= {"training.workers": [1, 2], "training.epochs": num_epochs}
        self.study = Killed.__new__(Killed)
        self.study.orders, self.study.log = folder / "orders", folder / "log"
        self.study.drivers = []
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


@pytest.mark.chaos
def test_a_training_grows_when_a_node_joins_and_shrinks_when_it_dies(
    nodes, tmp_path, weights_file, monkeypatch
):
    monkeypatch.setattr(trainer, "RESIZE_SECONDS", 5.0)
    elastic = Elastic(tmp_path, weights_file, 100)
    study = elastic.study
    nodes.add()

    def join_and_die() -> None:
        study.wait_for_epochs(3)
        nodes.add()
        study.wait_for(lambda: elastic.seen[-1] == 2, "growing")
        study.wait_for_epochs(3)
        assert study.num_repeated() <= 8
        num_repeated = study.num_repeated()
        nodes.lose_last()
        study.wait_for(lambda: elastic.seen[-1] == 1, "shrinking")
        study.wait_for_epochs(2)
        assert study.num_repeated() - num_repeated <= 4  # an epoch
        study.hurry()

    result = elastic.run(join_and_die)
    print("workers:", elastic.seen, "steps trained twice:", study.num_repeated())
    assert result.outcome == "completed"
    assert elastic.seen[0] == 1 and max(elastic.seen) == 2 and elastic.seen[-1] == 1
    assert {epoch for _, epoch, _ in study.trained()} == set(range(100))
