"""Real kills of real processes: nothing is lost, nothing runs twice, nothing is left behind.

Each test is a story: one study that is hit in several ways in turn, resumed each time, and checked
after every hit and at its end.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from drtune_ray.config.study import StudyConfig
from drtune_ray.execution.interrupts import SAVE_SECONDS
from drtune_ray.study.run import run_study
from drtune_ray.study.status import DONE, INTERRUPTED, RUNNING
from tests import leftovers
from tests.clusters import joined
from tests.study.test_study import mlflow_runs
from tests.survival import COMMAND, RESUMED, Joined, Killed, kill

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Each kills at other moments of the same story; one suffices to see that the story holds.
MORE_SEEDS = [pytest.param(seed, marks=pytest.mark.chaos) for seed in range(1, 12)]
HANG_SECONDS = 5
STEP_SECONDS = 0.1


def status_of(study: Killed) -> dict[str, Any]:
    """What `drtune-ray status --json` says."""
    command = [COMMAND, "status", str(study.folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def steps_of_running(study: Killed) -> list[int]:
    """The steps that the two running trials have trained of their epochs."""
    lines = (study.orders / "trained").read_text().splitlines()
    last: dict[str, int] = {}
    for _, digest, _, step, _ in map(json.loads, lines):
        last.pop(digest, None)  # the last ones trained are last
        last[digest] = step
    return list(last.values())[-2:]


@pytest.mark.xdist_group("survival-hits")
@pytest.mark.parametrize("seed", [0, *MORE_SEEDS])
def test_a_study_whose_actor_and_driver_are_killed_and_interrupted(killed, seed):
    moments, study = random.Random(seed), killed(trials=8)
    study.write(batch_size=2, epochs=3)  # of fourteen steps each
    study.environment["SABOTAGE_STEP_SECONDS"] = str(STEP_SECONDS)
    driver = study.start()

    # The driver is interrupted, twice in turn by each signal: its trials save where they are.
    study.wait_for(lambda: study.num_trained() >= 2, "training")
    for how in (signal.SIGINT, signal.SIGTERM):
        if how == signal.SIGINT:
            found = status_of(study)
            assert found["state"] == RUNNING
            assert found["driver"] == f"process {driver.pid} on {socket.gethostname()}"
            assert found["unfinished"] and found["seconds_since_last_sign"] < 30
        num_allowed = interrupt(study, driver, how)
        found = status_of(study)
        assert found["state"] == INTERRUPTED
        assert found["command"].endswith(f"drtune-ray tune {study.file}")
        driver = study.start()
        study.wait_for_epochs(2)
        assert study.num_repeated() <= num_allowed

    # A resident actor is killed: its trial resumes, and an epoch at most is trained again.
    num_repeated = study.num_repeated("epoch")
    time.sleep(moments.uniform(0, 0.4))
    kill(moments.choice(study.wait_for(study.actors, "an actor")))
    died = f"{RESUMED}: The actor is dead because its worker"
    study.wait_for(lambda: died in study.log.read_text(), "reported")
    study.wait_for_epochs(3)
    assert study.num_repeated("epoch") <= num_repeated + 1

    # The driver is killed.
    time.sleep(moments.uniform(0, 1))
    kill(driver.pid)
    driver.wait()
    study.hurry()
    assert "Best of 8 trials" in study.run()
    found = status_of(study)
    assert (found["state"], found["num_done"], found["num_unsent"]) == (DONE, 8, 0)
    # Of one actor; of two interrupted trials each time, which may have trained on; of two killed.
    study.check(num_lost=7)


def interrupt(study: Killed, driver: subprocess.Popen[bytes], how: signal.Signals) -> float:
    """Have both running trials save in the midst of an epoch.

    Returns:
        How many steps may have been repeated when the study is resumed.
    """
    num_repeated, printed = study.num_repeated(), len(study.log.read_text())
    study.wait_for(
        lambda: len(at := steps_of_running(study)) == 2 and min(at) >= 2 and max(at) <= 10,
        "both in the midst of an epoch",
    )
    started = time.monotonic()
    kill(driver.pid, how)
    study.wait_for(lambda: not study.actors(), "the actors gone", 30)
    seconds = time.monotonic() - started
    output = study.finish(driver, expected=130)[printed:]
    assert "Stopping: running trials" in output
    assert "The same command resumes where it stopped" in output
    assert "Traceback" not in output
    _, (parent,), children = mlflow_runs(study.folder)
    assert parent.info.status == "KILLED"
    assert "RUNNING" not in {run.info.status for run in children}
    unfinished = [trial for trial in study.trials() if not trial.state.is_finished()]
    assert unfinished
    for trial in unfinished:
        folder = study.folder / "trials" / f"{trial.number:05d}"
        names = {path.name for path in folder.iterdir()}
        has_saved = any(re.fullmatch(r"epoch-\d+-step-0*[1-9]\d*\.ckpt", name) for name in names)
        # A driver that left before its limit had the word of both trials.
        assert has_saved or seconds >= SAVE_SECONDS, names
    # A few steps may be trained after the save, until the process ends; none before it twice.
    return num_repeated + 2 * seconds / STEP_SECONDS


@pytest.mark.xdist_group("survival-kills")
@pytest.mark.parametrize("seed", [0, *MORE_SEEDS])
def test_a_joined_cluster_is_left_empty_and_decisions_are_the_same_after_kills(
    killed, tmp_path, shared_ray, seed
):
    """A driver is killed twice at random moments; the scheduler decides as without kills."""
    moments = random.Random(seed)
    changes: dict[str, Any] = {
        "trials": 6,
        "resources": {"trials_at_a_time": 1},
        "scheduler": {"name": "asha", "min_epochs": 1, "reduction_factor": 2},
    }
    (tmp_path / "whole").mkdir()
    whole = killed(tmp_path / "whole", **changes)
    run_study(StudyConfig.from_mapping(whole.values))
    (tmp_path / "broken").mkdir()
    broken = killed(tmp_path / "broken", kind=Joined, **changes)
    broken.values["trial"]["data"]["train"] = whole.values["trial"]["data"]["train"]
    broken.write()
    broken.join(shared_ray.address)
    for _ in range(2):
        driver = broken.start()
        broken.wait_for_epochs(8)
        time.sleep(moments.uniform(0, 1))
        kill(driver.pid)
        driver.wait()
        broken.wait_for(lambda: not broken.actors(), "the actors gone", 10)
    broken.hurry()
    assert "Best of 6 trials" in broken.run()
    broken.wait_for(lambda: not broken.actors(), "the actors gone", 10)
    with joined(shared_ray.address):
        leftovers.assert_cluster_is_empty()
    ends = [
        [(t.state.name, t.params, t.intermediate_values) for t in study.trials()]
        for study in (whole, broken)
    ]
    assert ends[0] == ends[1]
    states = {number: state for number, (state, _, _) in enumerate(ends[0])}
    assert set(states.values()) == {"COMPLETE", "PRUNED"}
    broken.check(num_lost=2, states=states)


@pytest.mark.xdist_group("survival-kills")
def test_processes_that_are_terminated_or_hang_are_replaced_or_fail_by_name(killed):
    """One trial at a time: who hangs once resumes, who always hangs fails and is retried later."""
    changes = {"trials_at_a_time": 1, "hang_seconds": HANG_SECONDS}
    study = killed(trials=2, resources=changes)
    study.environment["SABOTAGE_STEP_SECONDS"] = str(STEP_SECONDS)
    driver = study.start()

    # Terminated: it saves at the next step, and that is no failure (two are forgiven).
    study.wait_for(lambda: study.num_trained("step") > 5, "training")
    kill(study.wait_for(study.actors, "an actor")[0], signal.SIGTERM)
    study.wait_until_resumed(1)
    assert study.num_repeated() == 0  # not one step is lost

    # Hung, and then stopped by the system: ended, and resumed.
    study.order("hang@4", "stop@6")
    study.wait_until_resumed(3)
    output = study.log.read_text()
    hung = rf"hung for {HANG_SECONDS} s in .*sitecustomize\.py.*; its stacks: .*hung\.txt"
    assert re.search(hung, output), output
    assert f"hung for {HANG_SECONDS} s: it did not run" in output
    assert study.num_repeated("epoch") <= 2

    # The next trial hangs as often as it is begun.
    study.order("hang@2.0", "hang@2.1", "hang@2.2")
    output = study.finish(driver)
    assert f"trial 1 failed: hung for {HANG_SECONDS} s in" in output
    states = {0: "COMPLETE", 1: "FAIL"}
    assert study.trials()[1].user_attrs["outcome"] == f"hung for {HANG_SECONDS} s"
    assert "sitecustomize" in (study.folder / "trials" / "00001" / "hung.txt").read_text()
    study.check(num_lost=4, states=states)

    # The same command trains another in its place.
    study.hurry()
    study.run()
    study.check(num_lost=4, states=states | {2: "COMPLETE"})


@pytest.mark.chaos
@pytest.mark.xdist_group("survival-hits")
def test_an_actor_that_takes_the_hosts_memory_is_killed_and_its_trial_goes_on(killed):
    import psutil

    memory = psutil.virtual_memory()
    if memory.available < 5 * 2**30:
        pytest.skip("needs 5 GiB of free memory")
    study = killed(trials=2)
    study.write(epochs=5)
    threshold = (memory.total - memory.available + 3 * 2**30) / memory.total
    study.environment["RAY_memory_usage_threshold"] = f"{threshold:.4f}"
    study.environment["RAY_memory_monitor_refresh_ms"] = "50"
    study.order("hog@2")
    output = study.run()
    assert "running low on memory" in output
    assert "Traceback" not in output
    study.check(num_lost=2)


@pytest.mark.xdist_group("survival-hits")
def test_full_disks_are_named_and_the_study_can_go_on(killed):
    """First the disk of the checkpoints, then that of the driver."""
    study = killed(trials=2)
    trials, filler = study.folder / "trials", study.folder / "filler"
    trials.mkdir(parents=True)
    count = f"wc -l <{study.orders}/trained"
    fill = f"while [ $({count}) -le $known ]; do sleep 0.1; done; yes >{filler} 2>/dev/null"
    codes, output = run_on_small_disks(
        study,
        {study.folder: "8m", trials: "1m"},
        [
            f"mount -o remount,size=64m {trials}; known=$({count}); ({fill}) &",
            f"rm {filler}",
        ],
    )
    assert codes == [1, 3, 0], output
    assert "disk full" in output and "Traceback" not in output
    assert f"the disk that holds {study.folder} is full: free space there" in output
    assert "Best of " in output
    held = study.trials()
    assert {t.user_attrs["outcome"] for t in held} == {"disk full", "completed"}
    states = {trial.number: trial.state.name for trial in held}
    assert list(states.values()).count("COMPLETE") == 2
    assert set(states.values()) == {"FAIL", "COMPLETE"}
    study.check(num_lost=8, states=states)


def run_on_small_disks(
    study: Killed, disks: dict[Path, str], between: list[str]
) -> tuple[list[int], str]:
    """Run a study repeatedly with small disks of its own.

    Args:
        study: The study.
        disks: Where they are mounted, outer ones first, and their sizes.
        between: A command before each run but the first.

    Returns:
        The exit codes, and all that was printed.
    """
    mount = "; ".join(
        f"mkdir -p {folder}; mount -t tmpfs -o size={size} none {folder} || exit 99"
        for folder, size in disks.items()
    )
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount]).returncode:
        pytest.skip("this machine does not let tests mount a file system")
    command = f"{' '.join(study.command)}; echo code $?"
    script = "\n".join([mount, command, *(line for b in between for line in (b, command))])
    script += f"\ncp -r {study.folder} {study.orders}/kept"
    done = subprocess.run(
        [*unshare, script], env=study.environment, capture_output=True, text=True, timeout=900
    )
    output = done.stdout + done.stderr
    shutil.copytree(study.orders / "kept", study.folder, dirs_exist_ok=True)
    return [int(code) for code in re.findall(r"^code (\d+)$", done.stdout, re.MULTILINE)], output


@pytest.mark.chaos
@pytest.mark.xdist_group("survival-head")
@pytest.mark.parametrize("process", ["gcs_server", "raylet"])
def test_a_study_whose_ray_dies_ends_in_order(killed, process):
    """It ended with the exit code 1 and Ray's words, and its runs stayed RUNNING."""
    study = killed(trials=2)
    study.write(batch_size=2, epochs=3)
    study.environment["SABOTAGE_STEP_SECONDS"] = str(STEP_SECONDS)
    driver = study.start()
    study.wait_for(lambda: study.num_trained() >= 1, "training")
    (pid,) = [p for p, title in study.processes().items() if f"/{process}\0" in title.decode()]
    kill(pid)
    said = study.finish(driver, expected=3, seconds=50)
    assert "has ended or cannot be reached any more. Nothing that was saved is lost" in said
    assert "Traceback" not in said
    _, (parent,), children = mlflow_runs(study.folder)
    assert {run.info.status for run in (parent, *children)} == {"KILLED"}
    study.order("hurry")
    assert study.run(expected=0)
