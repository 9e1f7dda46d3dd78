"""The command line as users meet it: answers at once, and speaks plainly about bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drtune_ray.errors import ConfigError
from drtune_ray.study.machine import Machine
from drtune_ray.study.resolve import study_request, trial_request
from drtune_ray.values import read_yaml, to_yaml
from tests.small import BACKBONE, write_coloured

COMMAND = Path(sys.executable).with_name("drtune-ray")


def run(
    *arguments: str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | variables
    return subprocess.run(
        [str(COMMAND), *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_coloured(tmp_path / "images", per_class=6)


def refused(done: subprocess.CompletedProcess[str], message: str, storage: Path) -> None:
    """One clear message, exit code 2, no traceback, nothing written."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not storage.exists()


@pytest.mark.parametrize("command", ["tune", "train"])
@pytest.mark.parametrize("modes", [["--json"], ["--quiet", "--json"], ["--quiet"]])
def test_an_error_is_one_message_on_stderr_whatever_the_mode(tmp_path, command, modes):
    storage = tmp_path / "studies"
    given = ["--data", str(tmp_path / "nowhere"), "--storage", str(storage)]
    done = run(command, *given, *modes)
    message = "nowhere' is neither a folder nor a file: give a folder of class folders"
    refused(done, message, storage)
    assert done.stderr.count("\n") == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if "--json" in modes:
        assert (lines[-1]["kind"], lines[-1]["exit_code"]) == ("result", 2)
        assert message in lines[-1]["reason"]
    assert len(lines) == ("--json" in modes)  # nor are defaults told before


def test_precedence_is_set_over_flag_over_file_over_machine(images, tmp_path):
    file = tmp_path / "study.yaml"
    content = {
        "trials": 9,
        "trial": {
            "data": {"train": str(images)},
            "training": {"epochs": 3, "batch_size": 4},
            "optim": {"weight_decay": 0.5},
        },
    }
    file.write_text(to_yaml(content))
    flags = {"epochs": 5, "image_size": 48, "seed": 7}
    assignments = ["training.epochs=6", "scheduler.name=none", "trial.optim.momentum=0.5"]
    config, notes = study_request(file, assignments, flags)
    assert (config.trials, config.seed, config.name) == (9, 7, "images")
    assert config.scheduler.name == "none"
    trial = config.trial
    assert (trial.training.epochs, trial.training.batch_size) == (6, 4)
    assert (trial.data.image_size, trial.data.view_seed, trial.seed) == (48, 7, 7)
    assert (trial.optim.weight_decay, trial.optim.momentum) == (0.5, 0.5)
    assert "trials" not in notes[0] and "space=quick" in notes[0]


def test_a_space_in_the_file_is_no_default(images, tmp_path):
    file = tmp_path / "study.yaml"
    space = {"parameters": {"optim.backbone_lr": {"float": [0.001, 0.01]}}}
    file.write_text(to_yaml({"trial": {"data": {"train": str(images)}}, "space": space}))
    config, notes = study_request(file, [], {})
    assert config.space == space
    assert "space" not in notes[0] and "trials=" in notes[0]


def test_defaults_fit_few_images(images):
    config, notes = study_request(None, [], {"data_folder": str(images)})
    # 18 images, of which training gets at least 4.
    assert config.trial.training.batch_size == 4
    assert "trial.training.batch_size=4" in notes[0]


def test_another_backbone_takes_its_weights_from_timm(images):
    flags = {"data_folder": str(images), "backbone": "resnet18.a1_in1k"}
    config, _, _ = trial_request(None, [], flags)
    assert config.backbone.weights == "timm"


def test_presets_reach_a_training(images):
    flags = {"data_folder": str(images), "preset": "authors"}
    config, _, _ = trial_request(None, ["optim.nesterov=false"], flags)
    assert config.method.reduction == "mean"
    assert config.optim.schedule == "cosine_per_epoch"
    assert config.optim.nesterov is False


def test_resources_reach_a_training(images, tmp_path):
    flags = {"data_folder": str(images)}
    _, resources, _ = trial_request(None, ["resources.gpus_per_worker=0.5"], flags)
    assert (resources.gpus_per_worker, resources.cpus_per_worker) == (0.5, 1)
    file = tmp_path / "trial.yaml"
    file.write_text("resources: {wait_seconds: 5, cpus_per_worker: 2}\noptim: {nesterov: true}\n")
    config, resources, _ = trial_request(file, ["resources.cpus_per_worker=3"], flags)
    assert (resources.wait_seconds, resources.cpus_per_worker) == (5.0, 3)
    assert config.optim.nesterov
    with pytest.raises(ConfigError, match="'resources.wait_second'; did you mean 'resources.wait"):
        trial_request(None, ["resources.wait_second=5"], flags)


def test_a_share_of_a_gpu_takes_the_place_of_the_default(images, monkeypatch):
    monkeypatch.setattr("drtune_ray.study.resolve.this_machine", lambda: Machine(8, 2))
    flags, share = {"data_folder": str(images)}, ["resources.gpus_per_trial=0.25"]
    for resources in (
        study_request(None, share, flags)[0].resources,
        trial_request(None, share, flags)[1],
    ):
        assert (resources.gpus_per_trial, resources.gpus_per_worker) == (0.25, 0.0)
    assert study_request(None, [], flags)[0].resources.gpus_per_worker == 1.0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("clusters")
def test_train_on_two_workers_equals_one_and_is_a_run_of_its_own(
    shared_ray, tmp_path, weights_file
):
    """Frozen BatchNorm, K no multiple of the batch, an odd last batch: 20 steps to 1e-5."""
    import mlflow

    images = write_coloured(tmp_path / "images")
    storage = tmp_path / "studies"
    common = ["--data", str(images), "--storage", str(storage), "--backbone", BACKBONE]
    common += ["--weights", str(weights_file(BACKBONE)), "--image-size", "32", "--epochs", "5"]
    common += ["--set", "training.batch_size=9", "--set", "method.bank_size=20"]
    common += ["--set", "training.precision=float64", "--set", "optim.backbone_lr=0.02"]
    for workers in ("1", "2"):
        given = [*common, "--workers", workers, "--name", f"workers-{workers}"]
        done = run("train", *given, RAY_ADDRESS=shared_ray.address)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "epoch 5/5" in done.stdout
    again = run("train", *common, "--workers", "2", "--name", "workers-2")
    assert "This training is already done." in again.stdout
    client = mlflow.MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("drtune-ray")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "workers-1": "FINISHED",
        "workers-2": "FINISHED",
    }
    for part in ("step_cross_entropy", "step_distribution_regularization"):
        curves = [
            {m.step: m.value for m in client.get_metric_history(run.info.run_id, part)}
            for run in runs.values()
        ]
        assert len(curves[0]) == 20
        assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert read_yaml(storage / "workers-2" / "winner" / "model.yaml")["classes"] == [
        "blue",
        "green",
        "red",
    ]
    done = run("evaluate", "workers-2", "--storage", str(storage))
    assert done.returncode == 0
    assert "Test accuracy" in done.stdout
