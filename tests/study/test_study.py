"""Whole studies on a real Ray, with real MLflow and real files."""

from __future__ import annotations

import functools
import re
import shutil
import socket
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import drtune_ray
from drtune_ray.cli import cli
from drtune_ray.config.study import StudyConfig
from drtune_ray.data.pixels import DEFAULT_WHITES
from drtune_ray.data.splits import VALIDATION
from drtune_ray.display.text import size
from drtune_ray.errors import ConfigError, EnvironmentProblem, NoTrialCompleted
from drtune_ray.results.evaluate import measure
from drtune_ray.results.evaluation_record import RESULT_NAME
from drtune_ray.results.trials import TrialSummary
from drtune_ray.results.winner import read_winner
from drtune_ray.storage.record import REPORT_NAME
from drtune_ray.study.evaluation import evaluate_study
from drtune_ray.study.result import StudyResult
from drtune_ray.study.run import run_study
from drtune_ray.study.status import read_status
from drtune_ray.study.sync import page_of, sync_study
from drtune_ray.tracking.events import MetricsRecorded, RunFinished
from drtune_ray.tracking.sqlite_store import make_database
from drtune_ray.values import flattened, nested
from tests.clusters import address_set
from tests.small import BACKBONE, WINNER_FILES, small_values, write_coloured

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("shared_ray"),
    pytest.mark.xdist_group("study"),
]

SPACE = {
    "parameters": {
        "method.regularization_weight": {"float": [0.1, 2.0], "log": True},
        "optim.backbone_lr": {"float": [0.001, 0.02], "log": True},
    }
}


@functools.cache
def empty_mlflow() -> bytes:
    """An MLflow database without runs; MLflow takes seconds of CPU to create one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        make_database(f"sqlite:///{path}")
        return path.read_bytes()


def study_values(folder: Path, weights_file: Any, **changes: Any) -> dict[str, Any]:
    """A study of six trials that take a second each; its storage has an empty MLflow database."""
    images = write_coloured(folder / "images")
    tracking = folder / "studies" / "mlflow.db"
    if not tracking.exists():
        tracking.parent.mkdir(exist_ok=True)
        tracking.write_bytes(empty_mlflow())
    trial = small_values(images, weights_file) | {
        "training.batch_norm": "local",
        "optim.backbone_lr": 0.005,
        "training.epochs": 4,
    }
    values = {
        "name": "small",
        "storage": str(folder / "studies"),
        "trials": 6,
        "space": SPACE,
        "trial": nested(trial),
        "scheduler": {"name": "asha", "min_epochs": 1, "reduction_factor": 2},
        "resources": {"trials_at_a_time": 2},
        "finalists": {"num_seeds": 0},
    }
    return values | changes


def mlflow_runs(study: Path) -> tuple[Any, list[Any], list[Any]]:
    """(client, parent runs, child runs), once what a driver on a busy machine left is sent."""
    import mlflow

    sync_study(str(study), str(study.parent))
    client = mlflow.MlflowClient(page_of(str(study), str(study.parent))[0])
    experiment = client.get_experiment_by_name("drtune-ray")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return client, [run for run in runs if run not in children], children


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory, weights_file, ray_cluster
) -> tuple[StudyConfig, StudyResult, list[Any]]:
    folder = tmp_path_factory.mktemp("finished")
    config = StudyConfig.from_mapping(study_values(folder, weights_file))
    events: list[Any] = []
    with address_set(ray_cluster):
        return config, run_study(config, observer=events.append), events


def test_report__is_written_at_the_end_and_an_artifact(finished):
    config, result, _ = finished
    page = (config.folder / REPORT_NAME).read_text()
    assert f"Trial {result.winner.number} (" in page and "won with a validation" in page
    assert "The winner on the validation images" in page and "data:image/jpeg" in page
    client, (parent,), _ = mlflow_runs(config.folder)
    (file,) = client.list_artifacts(parent.info.run_id, "report")
    assert file.path == f"report/{REPORT_NAME}"


def test_every_trial_ends_and_the_best_completed_one_wins(finished):
    _, result, _ = finished
    assert [trial.number for trial in result.trials] == list(range(6))
    assert {trial.state for trial in result.trials} <= {"COMPLETE", "PRUNED"}
    completed = [t.best_val_accuracy for t in result.trials if t.state == "COMPLETE"]
    assert result.winner.best_val_accuracy == max(completed)
    assert [trial.reference for trial in result.references] == ["default", "ce_tuning", "authors"]
    assert {trial.num_epochs for trial in result.references} == {4}
    assert not result.was_done


def test_observers_hear_of_every_epoch_and_end(finished):
    _, result, events = finished
    epochs = Counter(e.number for e in events if isinstance(e, MetricsRecorded))
    assert epochs == {trial.number: trial.num_epochs for trial in result.trials}
    ends = {e.number: e.state for e in events if isinstance(e, RunFinished)}
    assert ends == {t.number: t.state for t in result.trials} | {None: "COMPLETE"}


def test_mlflow_holds_one_parent_and_a_child_for_each_trial(finished):
    _, result, _ = finished
    client, parents, children = mlflow_runs(result.folder)
    assert result.num_unsent == 0
    (parent,) = parents
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    digest = parent.data.tags["drtune.data_digest"]
    status = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED"}
    by_number = {int(run.data.tags["drtune.trial"]): run for run in children}
    assert len(children) == len(by_number) == 6
    for trial in result.trials:
        run = by_number[trial.number]
        assert run.info.status == status[trial.state]
        history = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert sorted(metric.step for metric in history) == [*range(1, trial.num_epochs + 1)]
        assert run.data.metrics["best_val_accuracy"] == trial.best_val_accuracy
        assert {"cross_entropy", "lr_backbone", "lr_head", "seconds"} <= run.data.metrics.keys()
        assert run.data.params["method.name"] == trial.config["method"]["name"]
        assert is_subset(run.data.params, trial)
        assert ("method.regularization_weight" in run.data.params) == (trial.number != 1)
        (dataset,) = run.inputs.dataset_inputs
        assert (dataset.dataset.name, dataset.dataset.digest) == ("images", digest[:36])
        tags = run.data.tags
        assert tags["drtune.version"] == drtune_ray.__version__
        assert (tags["drtune.seed"], tags["drtune.workers"]) == ("0", "1")
        assert tags["drtune.data_digest"] == digest and tags["drtune.host"] == socket.gethostname()
        assert ("[pruned]" in run.info.run_name) == (trial.state == "PRUNED")
    shown = {by_number[number].info.run_name for number in range(3)}
    assert shown == {"t000 default", "t001 ce_tuning", "t002 authors"}
    assert re.match(r"t003 (\[pruned\] )?lambda=[\d.]+ lr=[\d.e-]+$", by_number[3].info.run_name)
    assert "trials" not in parent.data.params and parent.data.tags["drtune.trials"] == "6"
    chart = client.get_metric_history(parent.info.run_id, "search_best_val_accuracy")
    assert sorted(metric.step for metric in chart) == [1, 2, 3, 4, 5, 6]
    assert max(metric.value for metric in chart) == result.best_trial.best_val_accuracy
    assert 0 <= parent.data.metrics["system/cpu_utilization_percentage"] <= 100
    inputs = [item.path for item in client.list_artifacts(parent.info.run_id, "inputs")]
    assert inputs == ["inputs/data.txt", "inputs/weights.json", "inputs/weights.txt"]
    names = [item.path for item in client.list_artifacts(parent.info.run_id, "winner")]
    assert sorted(names) == [f"winner/{name}" for name in WINNER_FILES]
    best = by_number[result.winner.number].info.run_id
    assert [item.path for item in client.list_artifacts(best, "checkpoint")] == [
        "checkpoint/best.ckpt"
    ]


def is_subset(params: dict[str, str], trial: TrialSummary) -> bool:
    """Whether params are settings of a trial; named ones are recorded as their numbers."""
    settings = flattened(trial.config)
    named = ("bank_over_batch", "one_plus_bank_over_batch")
    return all(params[p] == str(settings[p]) for p in params if settings[p] not in named)


def test_tables_are_read_by_pandas(finished):
    _, result, _ = finished
    trials, epochs = map(pandas.read_parquet, (result.trials_path, result.epochs_path))
    assert list(trials["best_val_accuracy"]) == [t.best_val_accuracy for t in result.trials]
    assert trials["optim.backbone_lr"].dtype == "float64"
    assert list(trials.columns) == list(result.trials_dataframe().columns)
    assert len(epochs) == sum(trial.num_epochs for trial in result.trials)
    last = epochs.groupby("number")["best_val_accuracy"].max()
    assert list(last) == list(trials["best_val_accuracy"])
    assert {"epoch", "time", "val_accuracy", "cross_entropy", "seconds"} <= set(epochs.columns)
    assert epochs["time"].notna().all()


def test_the_example_of_the_readme_runs_and_shows_its_progress(tmp_path, weights_file, capfd):
    """The README's Python, on a small backbone and three reference trials of one epoch."""
    page = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(from drtune_ray import StudyConfig.*?)```", page, re.S)
    values = study_values(tmp_path, weights_file, trials=3)
    changed = {
        '"storage": "drtune-studies"': f'"storage": {values["storage"]!r}',
        '"trials": 12': '"trials": 3',
        '"train": "flowers", "image_size": 96': f"'train': {str(tmp_path / 'images')!r}, "
        "'image_size': 32",
        '"tf_efficientnet_lite0", "weights": "demo"': f"'{BACKBONE}', 'weights': "
        f"{str(weights_file(BACKBONE))!r}",
        '"epochs": 8': '"epochs": 1, "batch_size": 8',
    }
    for former, small in changed.items():
        assert former in example
        example = example.replace(former, small)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    result, shown = names["result"], capfd.readouterr()
    assert "Study 'flowers':" in shown.err
    assert re.search(r"\[3/3\] trial \d \(\w+\): best validation accuracy", shown.err)
    assert f"Done: {result!r}" in shown.err
    assert str(result.model_path) in shown.out and result.model_path.exists()
    assert "method.regularization_weight" in shown.out
    assert drtune_ray.run_study(names["config"], progress=False).was_done
    assert "Study 'flowers'" not in capfd.readouterr().err


def test_finished_trials_keep_their_best_weights_and_nothing_else(finished):
    _, result, _ = finished
    for trial in result.trials:
        files = sorted(p.name for p in (result.folder / "trials" / f"{trial.number:05d}").iterdir())
        assert files == ["best.ckpt"]
    table = pq.read_table(result.folder / "trials.parquet")
    assert table["best_val_accuracy"].to_pylist() == [t.best_val_accuracy for t in result.trials]
    assert not (result.folder / ".tune").exists()


def test_the_winner_loads_again_and_gives_the_recorded_accuracy(finished):
    config, result, _ = finished
    winner = read_winner(result.folder / "winner")
    manifest = pq.read_table(result.folder / "splits.parquet").to_pylist()
    rows = [row for row in manifest if row["split"] == VALIDATION]
    found = measure(winner, Path(config.trial.data.train), rows, DEFAULT_WHITES)
    assert found.accuracy == result.winner.best_val_accuracy == winner.about["val_accuracy"]


def test_the_same_call_again_shows_the_result_without_running(finished):
    config, result, _ = finished
    again = run_study(config)
    assert again.was_done
    assert (again.study_id, again.winner, again.trials) == (
        result.study_id,
        result.winner,
        result.trials,
    )


def test_a_driver_killed_before_the_winner_was_written_names_it_later(finished):
    config, result, _ = finished
    (result.folder / "done").unlink()
    (result.folder / "winner" / "model.yaml").unlink()
    again = run_study(config)
    assert not again.was_done
    assert again.winner == result.winner
    assert read_winner(result.folder / "winner").about["trial"] == result.winner.number
    _, (parent,), children = mlflow_runs(result.folder)
    assert (parent.info.status, len(children)) == ("FINISHED", 6)


def test_a_lost_model_is_written_and_lost_weights_are_trained_again(finished):
    """By the same command, though the study is done: nothing has to be removed by hand."""
    config, result, _ = finished
    model, trials = result.folder / "winner" / "model.safetensors", result.folder / "trials"
    whole, number = model.read_bytes(), result.shipped.number
    model.write_bytes(whole[:-1])
    assert not run_study(config).was_done
    assert model.read_bytes() == whole

    # The weights of another trial: they came back as the winner with that trial's accuracy.
    best = trials / f"{number:05d}" / "best.ckpt"
    kept, notices = best.read_bytes(), list[str]()
    best.write_bytes((trials / f"{(number + 1) % 6:05d}" / "best.ckpt").read_bytes())
    shutil.rmtree(model.parent)
    again = run_study(config, on_notice=notices.append)
    assert again.winner == result.winner
    assert any("of another trial or configuration" in notice for notice in notices), notices
    assert model.read_bytes() == whole
    about = read_winner(model.parent).about
    assert about["trained_again"]["trial"] == number
    assert about["val_accuracy"] == result.shipped.best_val_accuracy
    assert run_study(config).was_done
    best.write_bytes(kept)
    shutil.rmtree(trials / f"again-{number:05d}")


def test_another_configuration_under_the_same_name_is_refused(finished):
    config, _, _ = finished
    values = config.to_mapping()
    values["trial"]["optim"]["weight_decay"] = 0.5
    with pytest.raises(ConfigError, match=r"trial\.optim\.weight_decay: 0\.0001 there, 0\.5 here"):
        run_study(StudyConfig.from_mapping(values))


def test_the_test_split_opens_once_unless_asked_again(finished):
    config, result, _ = finished
    found = evaluate_study("small", config.storage)
    assert found.validation.share == found.recorded_validation
    assert found.num_openings == 1
    # A second call shows the recorded result, and so does the status; the split stays closed.
    recorded = replace(found, is_recorded=True)
    assert evaluate_study("small", config.storage) == recorded
    assert read_status("small", config.storage).evaluation == recorded
    # Another winner of the same images would be measured on a split that is known by now.
    result_file = result.folder / RESULT_NAME
    kept = result_file.read_text()
    for other in (re.sub(r'(sha256": ")\w+', r"\g<1>0", kept), "{", "[]", '{"weights_sha256": 1}'):
        result_file.write_text(other)
        with pytest.raises(ConfigError, match=r"was opened before \(1 time\), first.*add --again"):
            evaluate_study("small", config.storage)
    assert evaluate_study("small", config.storage, again=True).num_openings == 2
    assert (result.folder / "winner" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    _, (parent,), _ = mlflow_runs(result.folder)
    assert parent.data.metrics["test_accuracy"] == found.test.share


def test_clean_frees_what_can_no_longer_win_and_the_study_goes_on(finished):
    config, result, _ = finished
    run = CliRunner()
    shown = run.invoke(cli, ["clean", str(result.folder)])
    assert shown.exit_code == 0, shown.output
    assert "checkpoints of 4 trials that can no longer win" in shown.output
    assert "Nothing was deleted. To delete" in shown.output
    assert len(list((result.folder / "trials").iterdir())) == 6
    before = read_status("small", config.storage).num_bytes
    done = run.invoke(cli, ["clean", str(result.folder), "--yes"])
    assert done.exit_code == 0 and done.output.strip().endswith("deleted.")
    freed = before - read_status("small", config.storage).num_bytes
    assert f"{size(freed)} deleted." in done.output
    left = {int(path.name) for path in (result.folder / "trials").iterdir()}
    assert len(left) == 2 and result.shipped.number in left
    assert "Nothing can be deleted." in run.invoke(cli, ["clean", str(result.folder)]).output
    table = run.invoke(cli, ["studies", "--storage", config.storage])
    header, row = table.output.splitlines()
    assert header.split()[:5] == ["name", "kind", "state", "trials", "best"]
    assert row.split()[:4] == ["small", "study", "done", "6/6"]
    cached = run.invoke(cli, ["clean", str(result.folder), "--cache", "--yes"])
    assert "prepared images and features" in cached.output
    again = run_study(config.model_copy(update={"trials": 7}))  # tables are built again
    assert (len(again.trials), again.was_done) == (7, False)
    assert read_winner(result.folder / "winner").about["trial"] == again.winner.number


def test_references_and_first_proposals_repeat_with_the_seed(finished, tmp_path, weights_file):
    _, result, _ = finished
    other = StudyConfig.from_mapping(study_values(tmp_path, weights_file, trials=4))
    again = run_study(other)
    pairs = list(zip(result.references, again.references, strict=True))
    assert [(a.best_val_accuracy) for a, _ in pairs] == [b.best_val_accuracy for _, b in pairs]
    varied = ("method", "optim")
    assert [result.trials[3].config[key] for key in varied] == [
        again.trials[3].config[key] for key in varied
    ]


def test_a_trial_too_large_for_the_machine_is_refused_with_the_numbers(tmp_path, weights_file):
    resources = {"cpus_per_worker": 4096}
    values = study_values(tmp_path, weights_file, resources=resources)
    message = r"a trial takes 1 x \{CPU: 4096\}.* but there are"
    with pytest.raises(EnvironmentProblem, match=message):
        run_study(StudyConfig.from_mapping(values))


def test_a_study_without_a_completed_trial_says_so(tmp_path, weights_file):
    values = study_values(tmp_path, weights_file, trials=2, reference_trials=[])
    values["space"] = {"parameters": {"optim.backbone_lr": {"float": [1e19, 1e20]}}}
    with pytest.raises(NoTrialCompleted, match=r"none of 2 trials completed \(diverged\)"):
        run_study(StudyConfig.from_mapping(values))
    _, (parent,), children = mlflow_runs(tmp_path / "studies" / "small")
    assert parent.info.status == "FAILED"
    assert {run.data.tags["drtune.outcome"] for run in children} == {"diverged"}


def test_a_dead_tracking_server_costs_only_delay(tmp_path, weights_file):
    values = study_values(
        tmp_path,
        weights_file,
        trials=2,
        reference_trials=["default"],
        tracking={"uri": "http://127.0.0.1:9"},
    )
    values["trial"] = values["trial"] | {"training": values["trial"]["training"] | {"epochs": 1}}
    config = StudyConfig.from_mapping(values)
    result = run_study(config)
    assert result.winner.state == "COMPLETE"
    assert result.num_unsent > 0
    with pytest.raises(EnvironmentProblem, match="MLflow did not take the events"):
        sync_study("small", config.storage)
    # The place of tracking may change: the same command sends the events of the study to SQLite.
    again = run_study(config.model_copy(update={"tracking": type(config.tracking)()}))
    assert again.was_done and again.num_unsent == 0
    assert sync_study("small", config.storage) == 0
    _, _, children = mlflow_runs(tmp_path / "studies" / "small")
    assert sorted(run.info.status for run in children) == ["FINISHED", "FINISHED"]
