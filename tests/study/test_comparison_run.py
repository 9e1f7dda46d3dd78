"""A comparison with studies that are trained in this process: what it opens, refuses, records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from drtune_ray.config.study import StudyConfig
from drtune_ray.data.splits import read_manifest, write_manifest
from drtune_ray.display.comparison import comparison_lines
from drtune_ray.errors import ConfigError, NoTrialCompleted
from drtune_ray.results.comparison.compared import SAME
from drtune_ray.results.comparison.result import RESULT_NAME, read_result
from drtune_ray.study import comparison as module
from drtune_ray.study.comparison import run_comparison
from drtune_ray.study.comparison_folds import run_folds
from drtune_ray.study.comparison_plan import Comparison, planned
from drtune_ray.study.folds_plan import FoldedComparison, planned_folds
from drtune_ray.study.inputs import check_inputs, manifest_path
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
    assert begun == ["small-ce_tuning", "small-dr_tune", "small-twin"]
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
    with pytest.raises(ConfigError, match=r"opened before \(1 time\), first.*add --again"):
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


def test_run_comparison__shares_are_tested_on_the_same_images_at_one_opening(plan, studies):
    whole = plan(1, TWO)
    comparison = planned(whole.config, TWO, shares="0.5,1")
    found = run_comparison(comparison, studies.run)
    assert len(openings(comparison)) == 1
    assert [runs.share for runs in found.methods.values()] == [1.0, 1.0, 0.5, 0.5]
    assert found.compared.baselines == ["ce_tuning-100pct", "ce_tuning-50pct"]
    numbers = [num_train(study) for study in comparison.studies.values()]
    assert numbers == [numbers[0], numbers[0], numbers[0] / 2, numbers[0] / 2]
    page = (comparison.folder / "comparison.html").read_text()
    assert "With fewer training images" in page and "DR-Tune at 50 %" in page
    assert run_comparison(comparison, studies.run).was_done


def num_train(study: StudyConfig) -> int:
    manifest = read_manifest(study.folder / "splits.parquet")
    assert manifest is not None
    return int(manifest["split"].to_pylist().count("train"))


def test_run_folds__every_image_is_tested_once_and_folds_decide(plan, studies):
    folded = planned_folds(plan(1, TWO).config, TWO, folds=3)
    begun: list[tuple[str, int]] = []
    found = run_folds(folded, studies.run, on_method=lambda *call: begun.append(call))
    assert begun[:3] == [
        ("small-fold1.1-ce_tuning", 1),
        ("small-fold1.1-dr_tune", 2),
        ("small-fold1.2-ce_tuning", 3),
    ]
    tests: list[str] = []
    for part in folded.parts:
        manifest = read_manifest(part.studies["dr_tune"].folder / "splits.parquet")
        assert manifest is not None
        rows = manifest.to_pylist()
        tests += [row["content_hash"] for row in rows if row["split"] == "test"]
    assert sorted(tests) == sorted({row["content_hash"] for row in rows})
    assert len(openings(folded.parts[0])) == 3 == found.num_openings
    known = [read_result(part.folder) for part in folded.parts]
    for name in ("ce_tuning", "dr_tune"):
        assert found.compared.scores[name].accuracies == tuple(
            each.compared.scores[name].mean for each in known if each
        )
    assert (found.compared.num_seeds, found.compared.is_folds) == (3, True)
    assert found.methods["dr_tune"].seeds == (1, 2, 3)
    text = "\n".join(comparison_lines(found))
    assert "3 folds with searches and models of their own" in text and "Folds: " in text
    assert "Accuracies of the folds" in (folded.folder / "comparison.html").read_text()
    again = run_folds(folded, studies.run)
    assert again == replace(found, was_done=True) and studies.num_trained == 3 * 2
    _check_folds_in_mlflow(folded)


def _check_folds_in_mlflow(folded: FoldedComparison) -> None:
    """The folds' runs are children of the comparison's."""
    import mlflow

    client = mlflow.MlflowClient(default_tracking_uri(folded.folder.parent))
    experiment = client.get_experiment_by_name("drtune-ray")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("small-compare")
    assert len(runs) == 3 and "test_accuracy.dr_tune" in parent.data.metrics
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"


def test_run_folds__a_class_that_is_too_small_is_named_before_anything_runs(plan, studies):
    folded = planned_folds(plan(1, TWO).config, TWO, folds=1000)
    with pytest.raises(ConfigError, match=r"data.folds=1000 needs 1000 different images"):
        run_folds(replace(folded, parts=folded.parts[:2]), studies.run)
    assert studies.num_trained == 0 and openings(folded.parts[0]) == []


def test_run_comparison__shares_with_other_test_images_are_refused(plan, studies):
    comparison = planned(plan(1, TWO).config, TWO, shares="0.5,1")
    data = comparison.studies["dr_tune-50pct"].trial.data
    storage = comparison.folder.parent
    former = check_inputs(comparison.studies["dr_tune-50pct"].trial, storage).splits.manifest
    path = manifest_path(data, storage)
    path.parent.mkdir(parents=True)
    write_manifest(former, path)
    write_coloured(storage.parent / "images", per_class=30)
    with pytest.raises(ConfigError, match=r"the test images of .*50pct are not the same"):
        run_comparison(comparison, studies.run)
    assert studies.num_trained == 0
