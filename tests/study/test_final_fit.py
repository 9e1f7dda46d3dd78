"""The final fit: once more on training and validation images, to the epoch at which it was best."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import pyarrow.parquet as pq
import pytest

from drtune_ray.config.study import StudyConfig
from drtune_ray.data.splits import TEST, VALIDATION
from drtune_ray.display.result import result_facts, result_lines
from drtune_ray.doctor.examine import study_setup
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.results.winner import read_winner
from drtune_ray.study.checks import check_study, study_trainings
from drtune_ray.study.evaluation import evaluate_study
from drtune_ray.study.run import run_study
from drtune_ray.tracking.events import MetricsRecorded, RunFinished, RunStarted
from tests.study.test_finals import values_of
from tests.study.test_study import mlflow_runs

pytestmark = pytest.mark.xdist_group("final_fit")

AGAIN = {"images": "all"}


def asked(folder: Any, weights_file: Any, **final_fit: Any) -> StudyConfig:
    values = values_of(folder, weights_file, final_fit=AGAIN | final_fit)
    values["trial"]["training"]["batch_norm"] = "frozen"
    return StudyConfig.from_mapping(values)


@pytest.mark.ray
@pytest.mark.slow
def test_the_winner_is_trained_again_on_validation_images_too(shared_ray, tmp_path, weights_file):
    """By as many workers as there are."""
    config = asked(tmp_path, weights_file, workers=[1, 2])
    events: list[Any] = []

    def interrupt(event: Any) -> None:
        """After the first epoch of the final fit."""
        events.append(event)
        if isinstance(event, MetricsRecorded) and isinstance(event.number, str):
            os.kill(os.getpid(), signal.SIGINT)  # epochs are told by a thread of their own

    with pytest.raises(KeyboardInterrupt):
        run_study(config, observer=interrupt)
    run = next(e.number for e in events if isinstance(e.number, str))
    ends = [e.state for e in events if isinstance(e, RunFinished) and e.number == run]
    assert ends == ["INTERRUPTED"]
    assert not (config.folder / "winner").exists()
    events.clear()
    result = run_study(config, observer=events.append)
    assert not [e for e in events if isinstance(e, RunStarted) and isinstance(e.number, int)]

    winner = read_winner(result.folder / "winner")
    manifest = pq.read_table(result.folder / "splits.parquet")["split"].to_pylist()
    num_images = len(manifest) - manifest.count(TEST)
    assert manifest.count(VALIDATION) > 0  # the study's own splits stay as they were
    best_epoch = result.winner.best_epoch
    assert winner.about["final_fit"] == {
        "trial": result.winner.number,
        "seed": 0,
        "epoch": best_epoch,
        "num_images": num_images,
        "outcome": "completed",
    }
    assert winner.trial.training.workers == (1, 2)
    assert winner.about["epoch"] == winner.trial.training.stop_epoch == best_epoch
    assert winner.about["val_accuracy"] is None and winner.about["shipped_trial"] is None
    assert result.final_fit == winner.about["final_fit"] == result_facts(result)["final_fit"]
    said = "\n".join(result_lines(result, "drtune-ray"))
    assert re.search(
        rf"The weights are those of the final fit: trial {result.winner.number}'s configuration, "
        rf"seed 0, trained on\n{num_images} images, training and validation together, to epoch "
        rf"{best_epoch}\. Only the test split can still measure it\.",
        said,
    )
    _, (parent,), children = mlflow_runs(result.folder)
    assert parent.data.tags["drtune.shipped"] == "final fit"
    (again,) = [child for child in children if "drtune.final_fit" in child.data.tags]
    assert again.info.status == "FINISHED" and again.info.run_name == run
    assert again.data.metrics["train_accuracy"] > 0
    assert "val_accuracy" not in again.data.metrics

    found = evaluate_study(str(result.folder), ".")
    assert found.validation is None and found.test.num_images == manifest.count(TEST)
    done = run_study(config)
    assert done.was_done and done.final_fit == result.final_fit

    # More trials under the same name: where they change nothing it is not trained again.
    events.clear()
    more = run_study(config.model_copy(update={"trials": 4}), observer=events.append)
    trained = [e for e in events if isinstance(e, MetricsRecorded) and isinstance(e.number, str)]
    assert bool(trained) == (more.winner.number != result.winner.number)


@pytest.mark.ray
@pytest.mark.slow
def test_one_that_diverges_is_reported_and_the_weights_of_the_best_seed_are_kept(
    shared_ray, tmp_path, weights_file, monkeypatch
):
    from drtune_ray.study import final_fit

    def diverged(run: Any, config: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        return fit(run, config.with_values({"optim.backbone_lr": 1e30}), *rest, **more)

    fit = final_fit.fit
    monkeypatch.setattr(final_fit, "fit", diverged)
    config = asked(tmp_path, weights_file).model_copy(update={"trials": 1})
    result = run_study(config)
    assert result.final_fit is not None and result.final_fit["outcome"] == "diverged"
    about = read_winner(result.folder / "winner").about
    assert about["val_accuracy"] == result.shipped.best_val_accuracy
    said = "\n".join(result_lines(result, "drtune-ray"))
    assert "The final fit diverged: the weights are those of the winner's best seed." in said
    _, _, children = mlflow_runs(result.folder)
    (again,) = [child for child in children if "drtune.final_fit" in child.data.tags]
    assert again.info.status == "FINISHED" and again.data.tags["drtune.outcome"] == "diverged"


def test_its_workers_are_checked_before_the_first_trial(tmp_path, weights_file):
    config = asked(tmp_path, weights_file, workers=2)
    trial = config.trial.with_values({"training.batch_norm": "local"})
    with pytest.raises(ConfigError) as caught:
        check_study(config.model_copy(update={"trial": trial}))
    assert str(caught.value) == (
        "final_fit.workers: training.batch_norm=local normalises over a part of the batch with "
        "training.workers=2: set frozen or synchronised"
    )


def test_tune_and_doctor_look_at_its_workers(tmp_path, weights_file):
    trainings = study_setup(asked(tmp_path, weights_file, workers=[1, 3]), None).trainings
    assert trainings["training.workers"].max_workers == 1
    assert trainings["final_fit.workers"].max_workers == 3
    assert trainings == study_trainings(asked(tmp_path, weights_file, workers=[1, 3]))
    assert list(study_trainings(asked(tmp_path, weights_file, images="none"))) == [
        "training.workers"
    ]


@pytest.mark.ray
def test_workers_that_no_machine_holds_are_refused_before_the_first_trial(
    shared_ray, tmp_path, weights_file
):
    config = asked(tmp_path, weights_file, workers=8)
    with pytest.raises(EnvironmentProblem, match="or final_fit.workers$"):
        run_study(config)
    assert not config.folder.exists()
