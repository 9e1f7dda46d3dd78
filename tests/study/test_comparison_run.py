"""A comparison with studies that are trained in this process: what it opens, refuses, records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from drtune_ray.config.study import StudyConfig
from drtune_ray.errors import ConfigError, NoTrialCompleted
from drtune_ray.results.comparison.compared import SAME
from drtune_ray.results.comparison.result import RESULT_NAME
from drtune_ray.study import comparison as module
from drtune_ray.study.comparison import run_comparison
from drtune_ray.study.comparison_plan import Comparison, planned
from drtune_ray.tracking.mlflow_client import default_tracking_uri
from drtune_ray.values import nested
from tests.small import small_values, write_coloured
from tests.study.trained_studies import TrainedStudies, best_weights

METHODS = "ce_tuning,dr_tune,twin=ce_tuning"
TWO = "ce_tuning,dr_tune"


@pytest.fixture
def studies() -> TrainedStudies:
    return TrainedStudies()


@pytest.fixture
def plan(tmp_path: Path, weights_file: Any) -> Any:
    images = write_coloured(tmp_path / "images")

    def make(num_seeds: int = 2, methods: str = METHODS) -> Comparison:
        trial = small_values(images, weights_file)
        trial |= {"training.epochs": 1, "optim.backbone_lr": 0.005, "training.batch_norm": "local"}
        values = {
            "name": "small",
            "storage": str(tmp_path / "studies"),
            "trial": nested(trial),
            "trials": 2,
            "reference_trials": [],
            "finalists": {"num_seeds": num_seeds},
        }
        return planned(StudyConfig.from_mapping(values), methods)

    return make


def openings(comparison: Comparison) -> list[dict[str, Any]]:
    path = comparison.folder.parent / "test-openings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_run_comparison__one_opening_paired_seeds_and_the_result_again(plan, studies):
    comparison, begun = plan(), []
    found = run_comparison(comparison, studies.run, on_method=lambda name, _: begun.append(name))
    assert begun == ["ce_tuning", "dr_tune", "twin"]
    assert studies.num_trained == 3 * 2
    assert [entry["model"] for entry in openings(comparison)] == [str(comparison.folder)]
    assert {runs.seeds for runs in found.methods.values()} == {(1, 2)}
    assert found.compared.differences["twin"].verdict == SAME
    assert "no difference" in found.sentences["twin"]
    assert found.compared.scores["twin"] == found.compared.scores["ce_tuning"]
    assert found.methods["dr_tune"].search_epochs == 1
    assert found.methods["ce_tuning"].searched == (
        "method.head_lr_multiplier",
        "optim.backbone_lr",
        "optim.weight_decay",
    )
    assert (found.was_done, found.num_unsent) == (False, 0)
    seeds = pq.read_table(comparison.folder / "seeds.parquet").to_pylist()
    assert [row["test_accuracy"] for row in seeds if row["name"] == "dr_tune"] == list(
        found.compared.scores["dr_tune"].accuracies
    )
    again = run_comparison(comparison, studies.run)
    assert again == replace(found, was_done=True)
    assert studies.num_trained == 3 * 2 and len(openings(comparison)) == 1
    _check_runs(comparison, studies)


def _check_runs(comparison: Comparison, studies: TrainedStudies) -> None:
    """One run in MLflow, whose id is the parent of the studies' runs."""
    import mlflow

    client = mlflow.MlflowClient(default_tracking_uri(comparison.folder.parent))
    experiment = client.get_experiment_by_name("drtune-ray")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("small-compare", "FINISHED")
    assert run.data.tags["drtune.kind"] == "comparison"
    assert "test_accuracy.dr_tune" in run.data.metrics
    names = [item.path for item in client.list_artifacts(run.info.run_id, "compare")]
    assert sorted(names) == ["compare/comparison.html", "compare/seeds.parquet"]
    for tags in studies.tags.values():
        assert tags["mlflow.parentRunId"] == run.info.run_id
        assert tags["drtune.comparison"] == run.data.tags["drtune.study_id"]


def test_run_comparison__more_seeds_need_another_opening_and_say_so_before_they_run(plan, studies):
    comparison = plan(methods=TWO)
    first = run_comparison(comparison, studies.run)
    (comparison.folder / RESULT_NAME).unlink()  # the answers are kept beside it
    assert run_comparison(comparison, studies.run) == first
    assert len(openings(comparison)) == 1
    with pytest.raises(ConfigError, match=r"opened 1 time\(s\) before.*add --again"):
        run_comparison(plan(3, TWO), studies.run)
    assert studies.num_trained == 2 * 2
    found = run_comparison(plan(3, TWO), studies.run, again=True)
    assert (found.num_openings, found.compared.num_seeds) == (2, 3)
    assert studies.num_trained == 2 * 3


def test_run_comparison__lost_weights_leave_the_split_sealed(plan, studies, monkeypatch):
    comparison = plan(methods=TWO)
    compared = module._compared

    def after_a_loss(*arguments: Any, **options: Any) -> Any:
        best_weights(comparison.folder.parent, "small-dr_tune", 2).unlink()
        return compared(*arguments, **options)

    monkeypatch.setattr(module, "_compared", after_a_loss)
    with pytest.raises(ConfigError, match=r"00002/best.ckpt is missing, the weights of a final"):
        run_comparison(comparison, studies.run)
    assert openings(comparison) == []


def test_run_comparison__a_method_without_a_complete_finalist_ends_it(plan, studies):
    comparison = plan(methods=TWO)

    def run(study: StudyConfig, tags: Any) -> Any:
        result = studies.run(study, tags)
        few = replace(result.finalists[0], runs=result.finalists[0].runs[:1])
        return replace(result, finalists=(few,))

    with pytest.raises(NoTrialCompleted, match="CE-tuning: no configuration completed on every"):
        run_comparison(comparison, run)
    assert openings(comparison) == []


def test_run_comparison__problems_of_all_studies_come_together_and_first(plan, studies, tmp_path):
    comparison = plan(methods=TWO)
    broken = {
        name: study.model_copy(update={"space": {"parameters": {f"nothing.{name}": 1}}})
        for name, study in comparison.studies.items()
    }
    with pytest.raises(ConfigError) as error:
        run_comparison(replace(comparison, studies=broken), studies.run)
    assert "ce_tuning: " in str(error.value) and "dr_tune: " in str(error.value)
    assert studies.num_trained == 0
