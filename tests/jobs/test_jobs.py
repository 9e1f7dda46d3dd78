"""Studies over a job server with a token: followed, left, stopped, killed and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest

from drtune_ray.demo import demo_config
from drtune_ray.values import deep_merge, to_yaml
from tests.jobs.jobs import JobCluster, interrupt
from tests.servers import mlflow_server
from tests.small import WINNER_FILES
from tests.study.test_study import study_values
from tests.survival import kill

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("jobs")]

NUM_TRIALS, NUM_EPOCHS = 3, 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobCluster]:
    """Two nodes of one CPU each."""
    made = JobCluster(tmp_path_factory.mktemp("cluster"), SABOTAGE_STEP_SECONDS="0.3")
    try:
        made.start(1, 1)
        yield made
    finally:
        made.end()
    assert made.processes() == {}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow") / "server") as address:
        yield address


def demo_file(folder: Path, tracking: str) -> Path:
    """The demo's study, smaller: its three reference trials."""
    values = demo_config(folder / "studies").to_mapping()
    smaller = {
        "trials": NUM_TRIALS,
        "tracking": {"uri": tracking},
        "trial": {
            "data": {"train_per_class": 6, "views": 1, "validation_fraction": 0.1},
            "training": {"epochs": NUM_EPOCHS, "batch_size": 10, "batch_norm": "local"},
        },
    }
    file = folder / "demo.yaml"
    file.write_text(to_yaml(deep_merge(values, smaller)))
    return file


def submitted(cluster: JobCluster, file: Path, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = cluster.command("submit", str(file), *arguments)
    environment = cluster.user(MLFLOW_TRACKING_PASSWORD="planted-1", OTHER_SECRET="planted-2")
    # Where the tests run in a shell's background, Ctrl-C is ignored, and children inherit that.
    return subprocess.Popen(
        command,
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def distinct_steps(trained: list[list[Any]]) -> set[tuple[Any, ...]]:
    """Trial, epoch and number of each step, repetitions left out."""
    return {tuple(entry[1:4]) for entry in trained if entry[0] == "step"}


def num_saved_steps(study: Path, trained: list[list[Any]]) -> int:
    """Number of steps in the newest checkpoints of all trials."""
    an_epoch = max(entry[3] for entry in trained if entry[0] == "epoch")
    newest: dict[str, int] = {}
    for path in study.glob("trials/*/epoch-*-step-*.ckpt"):
        _, epoch, _, step = path.stem.split("-")
        saved = int(epoch) * an_epoch + int(step)
        newest[path.parent.name] = max(saved, newest.get(path.parent.name, 0))
    return sum(newest.values())


def test_the_demo__followed_left_stopped_killed_and_gone_on_with(cluster, tracking, tmp_path):
    file = demo_file(tmp_path, tracking)
    study = tmp_path / "studies" / "demo"

    # No trial ends before it is stopped, however long the commands take.
    cluster.hold(NUM_EPOCHS - 1)
    # Followed, and left by Ctrl-C.
    first = submitted(cluster, file)
    # On both nodes: the trial of one is held, so that it cannot take the other's.
    cluster.wait_for(lambda: cluster.num_trained(0) and cluster.num_trained(1), "training")
    said, told = interrupt(first)
    assert first.returncode == 130, told
    assert "Running entrypoint for job drtune-demo-" in said
    assert "  3 trials (3 reference trials first), 2 at a time" in said
    job = cluster.jobs("demo")[0]["submission_id"]
    where = f"demo --storage {tmp_path}/studies --address {cluster.address}"
    assert told.splitlines() == [
        "tracking.uri names 127.0.0.1, which for the job is the machine that it runs on",
        f"Submitted {job} with study.yaml, MLFLOW_TRACKING_PASSWORD",
        f"Left {job} running",
        f"Follow it:  {cluster.command('x')[0]} logs {where} --follow",
        f"Stop it:    {cluster.command('x')[0]} stop {where}",
    ]

    # Met again while it runs, whatever is asked for now.
    second = cluster.run("submit", str(file), "--trials", "4", "--no-wait", "--json")
    assert second.returncode == 0
    assert json.loads(second.stdout)["jobs"][0]["submission_id"] == job
    assert second.stderr.splitlines()[1:3] == [
        f"{job} is already running: nothing was submitted",
        "It was submitted with other settings; to apply these, stop it first",
    ]
    following = submitted(cluster, file)
    assert [attempt["state"] for attempt in cluster.jobs("demo")] == ["RUNNING"]

    # Stopped: SIGTERM, of which it saves within Ray's three seconds.
    stopped = cluster.run("stop", "demo")
    assert (stopped.returncode, stopped.stdout) == (0, f"{job} is stopped\n")
    said, told = following.communicate(timeout=900)
    assert following.returncode == 130
    assert "Stopping: running trials write a checkpoint" in said
    assert told.splitlines()[-1] == f"Job {job} was stopped: repeat the command to resume"
    before = cluster.trained()
    num_lost = len(distinct_steps(before)) - num_saved_steps(study, before)
    cluster.release()

    # The next attempt goes on from there, and is killed.
    killed = submitted(cluster, file)
    cluster.wait_for(lambda: len(cluster.trained()) > len(before) + 4, "going on")
    steps = [entry for entry in cluster.trained() if entry[0] == "step"]
    # A step or two may follow the save of each process; all of an epoch where the machine is too
    # busy to save in Ray's three seconds. What was saved is not trained again.
    assert len(steps) - len(distinct_steps(steps)) <= num_lost
    (driver,) = cluster.drivers()
    kill(driver, signal.SIGKILL)
    _, told = killed.communicate(timeout=900)
    assert killed.returncode == 3
    next_job = f"{job.removesuffix('-1')}-2"
    assert told.splitlines()[-1] == (
        f"Job {next_job} was killed (signal 9): repeat the command to resume"
    )

    # And once more, to the end.
    cluster.hurry()
    done = submitted(cluster, file)
    said, told = done.communicate(timeout=900)
    assert done.returncode == 0, said + told
    assert "Best of 3 trials: trial " in said
    assert cluster.num_trained(0) > 0 and cluster.num_trained(1) > 0
    attempts = cluster.jobs("demo")
    assert [(a["number"], a["state"], a["exit_code"]) for a in attempts] == [
        (1, "STOPPED", None),
        (2, "FAILED", 137),
        (3, "SUCCEEDED", 0),
    ]
    check_mlflow(tracking)
    check_secrets(cluster, study, job)
    status = subprocess.run(
        [cluster.command("x")[0], "status", str(study), "--json"],
        env=cluster.user(),
        capture_output=True,
        text=True,
    )
    command = f"drtune-ray submit {file} --address {cluster.address}"
    assert json.loads(status.stdout)["command"] == command


def check_mlflow(tracking: str) -> None:
    """One parent, a finished child a trial, every epoch once."""
    client = mlflow.MlflowClient(tracking)
    experiment = client.get_experiment_by_name("drtune-ray")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (parent,) = [run for run in runs if run not in children]
    assert parent.info.status == "FINISHED"
    assert [run.info.status for run in children] == ["FINISHED"] * NUM_TRIALS
    for run in children:
        history = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert sorted(metric.step for metric in history) == list(range(1, NUM_EPOCHS + 1))
    names = [item.path for item in client.list_artifacts(parent.info.run_id, "winner")]
    assert sorted(names) == [f"winner/{name}" for name in WINNER_FILES]


def check_secrets(cluster: JobCluster, study: Path, job: str) -> None:
    """What was sent is what is listed; nothing of it is in what users keep or read."""
    (found,) = [j for j in cluster.get("/api/jobs/") if j["submission_id"] == job]
    sent = found["runtime_env"]["env_vars"]
    assert sent == {"MLFLOW_TRACKING_PASSWORD": "planted-1"}
    kept = b"".join(path.read_bytes() for path in study.rglob("*") if path.is_file())
    log = cluster.run("logs", "demo", "--attempt", "1").stdout
    assert "Running entrypoint" in log
    for text in (kept, log.encode()):
        assert b"planted" not in text
        assert cluster.token.encode() not in text


def test_a_study_that_the_job_refuses__has_its_exit_code(cluster, tmp_path, weights_file):
    file = tmp_path / "study.yaml"
    values = study_values(tmp_path, weights_file, name="refused")
    values["trial"]["data"]["train"] = "/nowhere/images"
    file.write_text(to_yaml(values))
    done = cluster.run("submit", str(file), "--json")
    assert done.returncode == 2
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert objects[-1]["kind"] == "result"
    assert "'/nowhere/images' is neither a folder nor a file" in objects[-1]["reason"]
    (job,) = cluster.jobs("refused")
    assert done.stderr.splitlines()[-1] == (
        f"Job {job['submission_id']} failed with exit code 2: see its log"
    )


def test_a_wrong_token__is_one_message(cluster):
    done = cluster.run("logs", "demo", RAY_AUTH_TOKEN="wrong")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"drtune-ray: {cluster.address} rejects the token from RAY_AUTH_TOKEN: give the one that "
        "the cluster was started with\n"
    )


def test_a_missing_token__is_said_before_anything_is_sent(cluster, tmp_path, weights_file):
    file = tmp_path / "study.yaml"
    file.write_text(to_yaml(study_values(tmp_path, weights_file, name="unsent")))
    for mode in ({}, {"RAY_AUTH_MODE": "token"}):
        done = cluster.run("submit", str(file), HOME=str(tmp_path), **mode)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith(f"drtune-ray: {cluster.address} requires a token")
        assert done.stderr.endswith("put the token into RAY_AUTH_TOKEN. Nothing was sent\n")
        assert len(done.stderr.splitlines()) == 1
    assert not any("unsent" in job["entrypoint"] for job in cluster.get("/api/jobs/"))
    found = cluster.run("status", "unsent")
    assert found.returncode == 2
    assert f"no study 'unsent' was submitted to {cluster.address}" in found.stderr
