"""Real kills of real processes: nothing is lost, nothing runs twice, nothing stays behind."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from drtune_ray.values import to_yaml
from tests.study.test_study import mlflow_runs
from tests.survival import Killed, kill

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MORE_SEEDS = [pytest.param(seed, marks=pytest.mark.chaos) for seed in range(1, 12)]


@pytest.mark.parametrize("seed", [0, *MORE_SEEDS])
def test_a_resident_actor_is_killed_at_random_moments(killed, seed):
    moments, study = random.Random(seed), killed()
    driver = study.start()
    for num_kills in range(2):
        study.wait_for(lambda n=4 + 9 * num_kills: study.num_trained() > n, "training")
        time.sleep(moments.uniform(0, 0.4))
        kill(moments.choice(study.wait_for(study.actors, "an actor")))
    output = study.finish(driver)
    # One that was between two trials when it was hit lost nothing.
    told = output.count("goes on from its last save: The actor is dead because its worker")
    assert 1 <= told <= 2
    study.check(num_lost=2)


@pytest.mark.parametrize("seed", [0, *MORE_SEEDS])
def test_the_driver_is_killed_at_random_moments(killed, seed):
    moments, study = random.Random(seed), killed()
    # Twice within the first seconds of training; whatever it was doing, the next one goes on.
    for _ in range(2):
        driver, before = study.start(), study.num_trained()
        study.wait_for(lambda n=before: study.num_trained() > n, "training")
        time.sleep(moments.uniform(0, 2))
        kill(driver.pid)
        driver.wait()
    assert "Best of 4 trials" in study.run()
    study.check(num_lost=4)  # two trials at a time


def test_a_driver_that_is_killed_leaves_nothing_on_a_cluster_that_it_joined(killed, monkeypatch):
    import ray
    from ray.util import placement_group_table

    from tests.clusters import cluster_of

    study = killed()
    for name in ("PYTHONPATH", "SABOTAGE"):
        monkeypatch.setenv(name, study.environment[name])
    with cluster_of([2]) as cluster:
        study.environment["RAY_ADDRESS"] = cluster.address
        driver = study.start()
        study.wait_for(lambda: study.num_trained() > 5, "training")
        kill(driver.pid)
        driver.wait()
        study.wait_for(lambda: not study.actors(), "the actors gone", 10)
        assert "Best of 4 trials" in study.run()
        study.wait_for(lambda: not study.actors(), "the actors gone", 10)
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            states = {group["state"] for group in placement_group_table().values()}
            assert states == {"REMOVED"}
            actors = ray._private.state.actors().values()
            assert {actor["State"] for actor in actors} == {"DEAD"}
        finally:
            ray.shutdown()
    study.check(num_lost=2)


def test_sigterm_to_an_actor_saves_at_the_next_step_and_goes_on(killed):
    study = killed(trials=1, resources={"trials_at_a_time": 1})
    study.environment["SABOTAGE_STEP_SECONDS"] = "0.1"
    driver = study.start()
    for num_terms in range(4):  # more often than a trial may fail
        study.wait_for(lambda n=2 + 6 * num_terms: study.num_trained("step") > n, "training")
        kill(study.wait_for(study.actors, "an actor")[0], signal.SIGTERM)
    output = study.finish(driver)
    assert output.count("trial 0 goes on from its last save") == 4
    assert set(study.trained("step").values()) == {1}  # not one step is lost
    study.check(num_lost=0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_driver_has_its_trials_save_and_says_how_to_go_on(killed, how):
    study = killed(trials=2)
    study.values["trial"]["training"] |= {"batch_size": 2, "epochs": 2}  # of fifteen steps each
    study.file.write_text(to_yaml(study.values))
    study.environment["SABOTAGE_STEP_SECONDS"] = "0.2"
    driver = study.start()
    study.wait_for(lambda: [step for _, _, step in study.trained("step")].count(3) == 2, "training")
    started = time.monotonic()
    kill(driver.pid, how)
    study.wait_for(lambda: not study.actors(), "the actors gone", 10)
    seconds = time.monotonic() - started
    # A job that Ray stops is killed after three; here other tests may hold the CPUs meanwhile.
    assert seconds < 10
    output = study.finish(driver, expected=130)
    assert "The same command resumes where it stopped" in output
    assert "Traceback" not in output
    _, (parent,), children = mlflow_runs(study.folder)
    assert {run.info.status for run in [parent, *children]} == {"KILLED"}  # none stays RUNNING
    for number in (0, 1):
        names = {path.name for path in (study.folder / "trials" / f"{number:05d}").iterdir()}
        assert any(re.fullmatch(r"epoch-\d+-step-0*[1-9]\d*\.ckpt", name) for name in names), names
    study.run()
    # A few steps may have been trained after the save, until the process ended.
    repeated = [count for count in study.trained("step").values() if count > 1]
    assert len(repeated) <= 2 * seconds / 0.2
    study.check(num_lost=2)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("hang@2", r"hung for 3 s in .*sitecustomize\.py.*; its stacks: .*hung\.txt"),
        ("stop@2", r"hung for 3 s: it did not run"),
    ],
)
def test_a_process_that_hangs_is_ended_and_its_trial_goes_on(killed, order, said):
    study = killed(resources={"trials_at_a_time": 2, "hang_seconds": 3})
    study.order(order)
    output = study.run()
    assert re.search(said, output), output
    study.check(num_lost=1)


def test_a_trial_that_always_hangs_fails_by_name_and_the_study_goes_on(killed):
    study = killed(
        trials=3,
        resources={"trials_at_a_time": 1, "hang_seconds": 2},
    )
    study.order("hang@2.0", "hang@2.1", "hang@2.2")
    output = study.run()
    assert "trial 0 failed: hung for 2 s in" in output
    states = {0: "FAIL", 1: "COMPLETE", 2: "COMPLETE"}
    assert study.trials()[0].user_attrs["outcome"] == "hung for 2 s"
    assert "sitecustomize" in (study.folder / "trials" / "00000" / "hung.txt").read_text()
    study.check(num_lost=2, states=states)
    # Made good by the same command.
    study.run()
    study.check(num_lost=2, states=states | {3: "COMPLETE"})


def test_an_actor_that_takes_the_hosts_memory_is_killed_and_its_trial_goes_on(killed):
    import psutil

    memory = psutil.virtual_memory()
    if memory.available < 4 * 2**30:
        pytest.skip("needs 4 GiB of free memory")
    study = killed()
    threshold = (memory.total - memory.available + 2.5 * 2**30) / memory.total
    study.environment["RAY_memory_usage_threshold"] = f"{threshold:.4f}"
    study.environment["RAY_memory_monitor_refresh_ms"] = "50"
    study.order("hog@2")
    output = study.run()
    assert "running low on memory" in output
    assert "Traceback" not in output
    study.check(num_lost=2)


def test_a_full_disk_at_checkpoint_time_is_named_and_the_study_can_go_on(killed):
    study = killed(trials=2)
    trials = study.folder / "trials"
    trials.mkdir(parents=True)
    codes, output = run_twice(study, {trials: "1m"}, between=f"mount -o remount,size=1g {trials}")
    assert codes == [1, 0], output
    assert "disk full" in output and "Traceback" not in output
    states = {trial.number: trial.state.name for trial in study.trials()}
    assert set(states.values()) == {"FAIL", "COMPLETE"}
    assert list(states.values()).count("COMPLETE") == 2
    assert {t.user_attrs["outcome"] for t in study.trials()} == {"disk full", "completed"}


def test_a_full_disk_of_the_driver_is_one_message(killed):
    study = killed(trials=2)
    trials, filler = study.folder / "trials", study.folder / "filler"
    trials.mkdir(parents=True)
    codes, output = run_twice(
        study,
        {study.folder: "8m", trials: "64m"},
        meanwhile=f"until [ -s {study.orders}/trained ]; do sleep 0.1; done; yes >{filler}",
        between=f"rm {filler}",
    )
    assert codes == [3, 0], output
    assert f"the disk that holds {study.folder} is full: free space there" in output
    assert "Traceback" not in output, output
    assert "Best of 2 trials" in output
    study.check(num_lost=2)


def run_twice(
    study: Killed, disks: dict[Path, str], *, between: str, meanwhile: str = "true"
) -> tuple[list[int], str]:
    """Run a study twice with small disks of its own.

    Args:
        study: The study.
        disks: Where they are mounted, outer ones first, and their sizes.
        between: A command between the runs, which makes room.
        meanwhile: One beside the first run.

    Returns:
        Both exit codes, and all that was printed.
    """
    mount = "; ".join(
        f"mkdir -p {folder}; mount -t tmpfs -o size={size} none {folder} || exit 99"
        for folder, size in disks.items()
    )
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount]).returncode:
        pytest.skip("this machine does not let tests mount a file system")
    command = " ".join(study.command)
    script = f"""
        {mount}
        ({meanwhile}) &
        {command}; first=$?
        {between} || exit 98
        {command}; echo codes $first $?
        cp -r {study.folder} {study.orders}/kept
    """
    done = subprocess.run(
        [*unshare, script], env=study.environment, capture_output=True, text=True, timeout=200
    )
    output = done.stdout + done.stderr
    shutil.copytree(study.orders / "kept", study.folder, dirs_exist_ok=True)
    return [int(code) for code in re.findall(r"codes (\d+) (\d+)", output)[-1]], output


def test_decisions_of_the_scheduler_are_the_same_after_kills(killed, tmp_path):
    changes = {
        "trials": 6,
        "resources": {"trials_at_a_time": 1},
        "scheduler": {"name": "asha", "min_epochs": 1, "reduction_factor": 2},
    }
    whole = killed(**changes)
    whole.hurry()
    whole.run()
    (tmp_path / "again").mkdir()
    broken = killed(tmp_path / "again", **changes)
    broken.values["trial"]["data"]["train"] = whole.values["trial"]["data"]["train"]
    broken.file.write_text(to_yaml(broken.values))
    for _ in range(2):
        driver, before = broken.start(), broken.num_trained()
        broken.wait_for(lambda n=before: broken.num_trained() > n + 9, "training")
        kill(driver.pid)
        driver.wait()
    broken.run()
    ends = [
        [(t.state.name, t.params, t.intermediate_values) for t in study.trials()]
        for study in (whole, broken)
    ]
    assert ends[0] == ends[1]
    assert {state for state, _, _ in ends[0]} == {"COMPLETE", "PRUNED"}
