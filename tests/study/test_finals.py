"""Whole small studies on real Ray: finals on new seeds, backbones to choose from, objectives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from drtune_ray.cli import cli
from drtune_ray.config.study import StudyConfig
from drtune_ray.display.result import result_lines
from drtune_ray.results.winner import read_winner
from drtune_ray.study.result import StudyPlan, StudyResult
from drtune_ray.study.run import run_study
from drtune_ray.tracking.events import RunStarted
from tests.clusters import address_set
from tests.small import BACKBONE, NORM_FREE
from tests.study.test_study import mlflow_runs, study_values

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("shared_ray"),
    pytest.mark.xdist_group("finals"),
]


def values_of(folder: Path, weights_file: Any, **changes: Any) -> dict[str, Any]:
    values = study_values(folder, weights_file, trials=3, reference_trials=["default"])
    values["trial"]["training"]["epochs"] = 2
    return values | changes


def test_the_finals_name_the_winner_and_are_resumed(tmp_path, weights_file):
    """By log loss, a metric that is minimised; then a trial of the study is repeated."""
    finals = {"num_configurations": 1, "num_seeds": 2}
    reference_trials = ["default", "ce_tuning"]
    given = {"finalists": finals, "reference_trials": reference_trials, "objectives": ["log_loss"]}
    values = values_of(tmp_path, weights_file, **given)
    plans: list[StudyPlan] = []

    def interrupt(event: Any) -> None:
        """In the midst of the finals."""
        if isinstance(event, RunStarted) and event.number == 4:
            raise KeyboardInterrupt

    config = StudyConfig.from_mapping(values)
    with pytest.raises(KeyboardInterrupt):
        run_study(config, observer=interrupt, on_plan=plans.append)
    assert [plan.part for plan in plans] == ["search", "finalists"]
    plans.clear()
    result = run_study(config, on_plan=plans.append)
    assert [plan.part for plan in plans] == ["finalists"]
    assert [trial.finalist is None for trial in result.trials] == [True] * 3 + [False] * 4
    best, ce_tuning = result.finalists
    assert best.is_complete and ce_tuning.is_complete
    assert ce_tuning.source.reference == "ce_tuning"
    assert [run.config["seed"] for run in best.runs] == [1, 2]
    winner = min(result.finalists, key=lambda finalist: finalist.mean)
    assert result.winner == winner.source and result.shipped == winner.best_run
    about = read_winner(result.folder / "winner").about
    assert (about["metric"], about["mean_val_loss"]) == ("log_loss", winner.mean)
    assert winner.best_run.best_value == min(winner.values) == about["val_loss"]
    assert result.winner.to_mapping()["best_val_loss"] == result.winner.best_value
    assert about["shipped_trial"] == result.shipped.number
    _, (parent,), children = mlflow_runs(result.folder)
    assert parent.data.tags["drtune.winner"] == str(result.winner.number)
    marks = [run.data.tags.get("drtune.finalist") for run in children]
    assert sorted(mark for mark in marks if mark) == sorted(t.finalist for t in result.trials[3:])
    assert {run.info.status for run in children} <= {"FINISHED", "KILLED"}
    said = "\n".join(result_lines(result, "drtune-ray"))
    assert "The winner is chosen by this mean, not by the search's best of 3 trials" in said
    assert run_study(config).was_done
    more = config.model_copy(
        update={"finalists": config.finalists.model_copy(update={"num_seeds": 3})}
    )
    again = run_study(more)
    assert len(again.trials) == 9 and all(f.is_complete for f in again.finalists)
    repeat(again)


def repeat(study: StudyResult) -> None:
    """A trial of the study, by `drtune-ray train --from` on Ray Train."""
    trial = study.searched_trials[-1]
    command = ["train", "--from", f"{study.folder}:{trial.number}"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    said = f"Trial {trial.number} of small had {trial.best_value:.4f} (log loss"
    assert said in done.stdout
    assert "the same figure came again" in done.stdout
    model = read_winner(study.folder.parent / f"small-trial-{trial.number}" / "winner")
    assert model.about["val_loss"] == pytest.approx(trial.best_value, rel=1e-9)


@pytest.fixture(scope="module")
def front(
    tmp_path_factory: Any, weights_file: Any, ray_cluster: Any
) -> tuple[StudyConfig, StudyResult]:
    """A study over two backbones, for accuracy against parameters."""
    files = {name: str(weights_file(name)) for name in (BACKBONE, NORM_FREE)}
    space = {
        "parameters": {
            "backbone.name": {"choice": [BACKBONE, NORM_FREE]},
            "backbone.weights": {
                "expression": f"{files[BACKBONE]!r} if backbone.name == {BACKBONE!r} "
                f"else {files[NORM_FREE]!r}"
            },
            "optim.backbone_lr": {"float": [0.001, 0.02], "log": True},
            "method.bank_size": {"int": [8, 64]},
        },
        "constraints": ["method.bank_size <= data.num_train", "method.bank_size >= 12"],
    }
    values = values_of(
        tmp_path_factory.mktemp("front"),
        weights_file,
        trials=6,
        space=space,
        objectives=["val_accuracy", "num_parameters", "calibration_error"],
        start_with=[{"backbone.name": NORM_FREE}],
    )
    config = StudyConfig.from_mapping(values)
    with address_set(ray_cluster):
        return config, run_study(config)


def test_trials_of_several_backbones_share_a_study(front):
    _, result = front
    assert len(result.trials) == 6
    names = {trial.config["backbone"]["name"] for trial in result.trials}
    assert names == {BACKBONE, NORM_FREE}
    assert result.trials[0].config["backbone"]["name"] == NORM_FREE  # the user's own point
    sizes = {trial.config["method"]["bank_size"] for trial in result.trials}
    assert min(sizes) >= 12 and max(sizes) <= 28
    winner = read_winner(result.folder / "winner")
    assert winner.trial.backbone.name == result.winner.config["backbone"]["name"]


def test_the_pareto_front_holds_what_nothing_beats(front):
    _, result = front
    complete = [trial for trial in result.trials if trial.state == "COMPLETE"]
    for trial in complete:
        assert trial.objectives["val_accuracy"] == trial.best_val_accuracy
        assert math.isfinite(trial.objectives["calibration_error"])

    def goods(trial: Any) -> tuple[float, ...]:
        o = trial.objectives
        return o["val_accuracy"], -o["num_parameters"], -o["calibration_error"]

    def beats(one: Any, other: Any) -> bool:
        pairs = list(zip(goods(one), goods(other), strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    undominated = [t for t in complete if not any(beats(other, t) for other in complete)]
    assert {t.number for t in result.pareto_front} == {t.number for t in undominated}
    sizes = {t.config["backbone"]["name"]: t.objectives["num_parameters"] for t in complete}
    assert len(set(sizes.values())) == len(sizes)
    assert "Pareto front" in "\n".join(result_lines(result, "drtune-ray"))


def test_a_study_of_several_objectives_is_resumed_by_its_trials(front):
    """Its epochs lie in attributes of the trials, not in Optuna's intermediate values."""
    config, result = front
    assert run_study(config).was_done
    more = run_study(config.model_copy(update={"trials": 7}))
    assert [t.number for t in more.trials][:6] == [t.number for t in result.trials]
    assert more.trials[:6] == result.trials
    assert len(more.trials) == 7
