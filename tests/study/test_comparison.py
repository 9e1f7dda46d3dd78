"""A comparison of methods on a real Ray, with real MLflow: from an interruption to its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from drtune_ray.cli import cli
from drtune_ray.config.study import StudyConfig
from drtune_ray.data.kinds.recognize import open_images
from drtune_ray.results.comparison.compared import SAME
from drtune_ray.results.evaluate import evaluate
from drtune_ray.results.evaluation_record import Evaluation
from drtune_ray.storage.record import SPLITS_NAME, WINNER_NAME
from drtune_ray.study.comparison import run_comparison
from drtune_ray.study.comparison_plan import Comparison, planned
from drtune_ray.study.run import run_study
from drtune_ray.tracking.mlflow_client import default_tracking_uri
from drtune_ray.values import to_yaml
from tests.clusters import address_set
from tests.study.test_study import study_values

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.xdist_group("study"),
]

METHODS = "ce_tuning,dr_tune,twin=ce_tuning"
SPACES = ("ce_tuning=SPACE", "dr_tune=SPACE", "twin=SPACE")
SPACE = {"parameters": {"optim.backbone_lr": {"float": [0.001, 0.02], "log": True}}}


class Story:
    """A comparison that was interrupted, resumed by the command, and repeated."""

    def __init__(self, folder: Path, weights_file: Any) -> None:
        values = study_values(folder, weights_file, trials=2, reference_trials=[])
        values["trial"]["training"]["epochs"] = 2
        values |= {
            "space": SPACE,
            "scheduler": {"name": "none"},
            "finalists": {"num_configurations": 1, "num_seeds": 2},
        }
        self.storage = Path(values["storage"])
        (folder / "space.yaml").write_text(to_yaml(SPACE))
        (folder / "study.yaml").write_text(to_yaml(values))
        self.file = folder / "study.yaml"
        self.spaces = [space.replace("SPACE", f"{folder}/space.yaml") for space in SPACES]
        self.folder = self.storage / "small-compare"
        self.events: list[str] = []
        self._interrupted(planned(StudyConfig.from_mapping(values), METHODS, self.spaces))
        self.first = self.compare("--json")
        self.repeated = self.compare("--json")
        self.more_seeds = self.compare("--finalist-seeds", "3")

    def _interrupted(self, comparison: Comparison) -> None:
        def run(study: StudyConfig, tags: Any) -> Any:
            if study.name == "small-dr_tune":
                raise KeyboardInterrupt
            return run_study(study, tags=tags)

        with pytest.raises(KeyboardInterrupt):
            run_comparison(comparison, run)
        self.status_then = self.run_of("small-compare").info.status

    def compare(self, *options: str) -> Result:
        spaces = [part for space in self.spaces for part in ("--method-space", space)]
        command = ["compare", str(self.file), "--methods", METHODS, *spaces, *options]
        return CliRunner().invoke(cli, command)

    def run_of(self, name: str) -> Any:
        return next(run for run in self.runs() if run.info.run_name == name)

    def runs(self) -> list[Any]:
        import mlflow

        client = mlflow.MlflowClient(default_tracking_uri(self.storage))
        experiment = client.get_experiment_by_name("drtune-ray")
        return list(client.search_runs([experiment.experiment_id]))


@pytest.fixture(scope="module")
def story(tmp_path_factory: Any, weights_file: Any, ray_cluster: Any) -> Story:
    with address_set(ray_cluster):
        return Story(tmp_path_factory.mktemp("compared"), weights_file)


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_interruption__is_recorded_and_resumed(story):
    assert story.status_then == "KILLED"
    *progress, end = lines(story.first)
    begun = [line["number"] for line in progress if line["kind"] == "run_started"]
    assert begun.count(None) == 2  # the study of CE-tuning was done before
    assert (end["exit_code"], end["was_done"]) == (0, False)
    assert story.run_of("small-compare").info.status == "FINISHED"


def test_result__twins_show_no_difference_and_seeds_are_counted(story):
    end = lines(story.first)[-1]
    differences = end["compared"]["differences"]
    assert differences["twin"]["verdict"] == SAME
    assert "no difference" in end["sentences"]["twin"]
    assert "cannot be decided with 2 seeds; 7 needed" in end["sentences"]["dr_tune"]
    assert (differences["dr_tune"]["baseline"], end["compared"]["num_seeds"]) == ("ce_tuning", 2)
    for runs in end["methods"].values():
        assert runs["searched"] == ["optim.backbone_lr"]
        assert runs["search_epochs"] == 2 * 2 and runs["seeds"] == [1, 2]
        assert runs["epoch_seconds"] > 0
    shares = {name: runs["dr_gradient_share"] for name, runs in end["methods"].items()}
    epochs = pq.read_table(story.storage / "small-dr_tune" / "epochs.parquet").to_pandas()
    finals = epochs[epochs["number"].isin(end["methods"]["dr_tune"]["runs"])]
    assert shares["ce_tuning"] is shares["twin"] is None
    assert 0 < shares["dr_tune"] == finals["dr_gradient_share"].median() < 1


def test_test_split__is_opened_once(story):
    (entry,) = [
        json.loads(line)
        for line in (story.storage / "test-openings.jsonl").read_text().splitlines()
    ]
    assert entry["model"] == str(story.folder)
    assert lines(story.first)[-1]["num_openings"] == 1


def test_answers__are_those_of_the_shipped_models(story):
    seeds = pq.read_table(story.folder / "seeds.parquet").to_pylist()
    assert [(row["name"], row["seed"]) for row in seeds] == [
        (name, seed) for name in ("ce_tuning", "dr_tune", "twin") for seed in (1, 2)
    ]
    for name in ("ce_tuning", "dr_tune"):
        study = story.storage / f"small-{name}"
        found = _evaluated(story, study)
        best = max(
            (row for row in seeds if row["name"] == name),
            key=lambda row: (row["val_value"], -row["trial"]),
        )
        assert found.test.share == best["test_accuracy"]
        assert found.validation is not None and found.validation.share == (
            pytest.approx(best["val_value"])
        )


def _evaluated(story: Story, study: Path) -> Evaluation:
    config = StudyConfig.from_mapping(
        {"name": "x", "trial": {"data": {"train": str(story.file.parent / "images")}}}
    )
    apart = study / "elsewhere"  # this opening is recorded where the story does not count it
    apart.mkdir(exist_ok=True)
    root = open_images(config.trial.data)
    return evaluate(study / WINNER_NAME, study / SPLITS_NAME, root, apart)


def test_same_command__shows_the_result(story):
    first, repeated = lines(story.first)[-1], lines(story.repeated)[-1]
    assert repeated["was_done"] is True
    for key in ("compared", "methods", "conclusion", "time_ms"):
        assert repeated[key] == first[key]
    assert not [line for line in lines(story.repeated) if line["kind"] == "run_started"]


def test_more_seeds__another_opening_is_refused_before_any_training(story):
    assert story.more_seeds.exit_code == 2 or story.more_seeds.exception is not None
    assert "add --again to open it anyway" in str(story.more_seeds.exception)
    trials = pq.read_table(story.storage / "small-ce_tuning" / "trials.parquet")
    assert len(trials) == 2 + 2


def test_mlflow__the_studies_are_children_of_the_comparison(story):
    parent = story.run_of("small-compare")
    assert parent.data.tags["drtune.kind"] == "comparison"
    assert parent.data.params["method.twin"] == "ce_tuning"
    assert parent.data.metrics.keys() >= {"test_accuracy.dr_tune", "test_accuracy.ce_tuning"}
    runs = story.runs()
    for name in ("ce_tuning", "dr_tune", "twin"):
        study = story.run_of(f"small-{name}")
        assert study.data.tags["mlflow.parentRunId"] == parent.info.run_id
        trials = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == study.info.run_id]
        assert len(trials) == 2 + 2


def test_page__says_the_result(story):
    page = (story.folder / "comparison.html").read_text()
    assert lines(story.first)[-1]["conclusion"].split(";")[0][:40] in page
    assert "Better than CE-tuning?" in page
