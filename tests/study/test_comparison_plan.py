"""The plan of a comparison: the same budget for every method, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drtune_ray.config.study import StudyConfig
from drtune_ray.display.comparison import comparison_plan_lines
from drtune_ray.errors import ConfigError
from drtune_ray.results.comparison.significance import seeds_to_decide
from drtune_ray.results.words import title
from drtune_ray.study.comparison_plan import Comparison, planned
from drtune_ray.study.folds_plan import planned_folds


def config(**changes: Any) -> StudyConfig:
    values = {"name": "flowers", "storage": "studies", "trials": 6, "space": "quick"}
    trial = {"data": {"train": "images"}, "training": {"epochs": 10}}
    return StudyConfig.from_mapping(values | {"trial": trial} | changes)


def plan(methods: str = "ce_tuning,dr_tune", *spaces: str, **changes: Any) -> Comparison:
    return planned(config(**changes), methods, spaces)


def refused(methods: str = "ce_tuning,dr_tune", *spaces: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        plan(methods, *spaces, **changes)
    return str(error.value)


def test_planned__studies_differ_in_method_space_and_name_alone() -> None:
    found = plan()
    assert (found.folder.name, found.baselines) == ("flowers-compare", {"dr_tune": "ce_tuning"})
    one, other = (study.to_mapping() for study in found.studies.values())
    assert (one.pop("name"), other.pop("name")) == ("flowers-ce_tuning", "flowers-dr_tune")
    assert "method.regularization_weight" in other.pop("space")["parameters"]
    assert one.pop("space")["parameters"].keys() == {
        "method.name",
        "method.head_lr_multiplier",
        "optim.backbone_lr",
        "optim.weight_decay",
    }
    names = (one["trial"]["method"].pop("name"), other["trial"]["method"].pop("name"))
    assert names == ("ce_tuning", "dr_tune")
    assert one == other
    assert one["reference_trials"] == []


def test_planned__epochs_of_search_are_equal_whatever_is_stopped_early() -> None:
    for study in plan().studies.values():
        assert study.budget.max_epochs == 6 * 10
        assert study.trials == 60  # as many as the epochs allow
    for study in plan(scheduler={"name": "none"}).studies.values():
        assert (study.budget.max_epochs, study.trials) == (None, 6)
    for study in plan(budget={"max_epochs": 30}).studies.values():
        assert (study.budget.max_epochs, study.trials) == (30, 6)


@pytest.mark.parametrize(
    ("methods", "seeds"),
    [("ce_tuning,dr_tune", 6), ("ce_tuning,a=dr_tune,b=dr_tune,c=dr_tune,d=dr_tune", 8)],
)
def test_planned__as_few_seeds_as_can_decide(methods: str, seeds: int) -> None:
    found = planned(config(), methods, has_seeds=False)
    assert {s.finalists.num_seeds for s in found.studies.values()} == {seeds}
    assert planned(config(), methods).config.finalists.num_seeds == 2


def test_planned__a_space_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("parameters: {optim.momentum: {float: [0.5, 0.9]}}\n")
    found = plan("ce_tuning,mine=dr_tune", f"mine={tmp_path}/mine.yaml")
    assert set(found.studies["mine"].space["parameters"]) == {"optim.momentum"}  # type: ignore
    assert found.studies["mine"].name == "flowers-mine"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("dr_tune,other=dr_tune", "--methods=dr_tune,other=dr_tune lacks ce_tuning"),
        ("ce_tuning", "at least two methods, but got 'ce_tuning'"),
        ("ce_tuning,ce_tuning", "'ce_tuning' twice: name one of them, as in other=ce_tuning"),
        ("ce_tuning,nothing", "nothing: there is no search_spaces/nothing.yaml"),
        ("ce_tuning,compare=dr_tune", "give the method another name"),
        ("ce_tuning,a/b=dr_tune", "'flowers-a/b'"),
    ],
)
def test_planned__methods_that_are_refused(methods: str, message: str) -> None:
    assert message in refused(methods)


def test_planned__an_unknown_method_is_named() -> None:
    text = refused("ce_tuning,new=nothing", "new=quick")
    assert text.startswith("new: ") and "nothing" in text


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("quick", "--method-space='quick' is not NAME=SPACE"),
        ("l2_sp=quick", "one of the names ['ce_tuning', 'dr_tune']"),
        ("dr_tune=ablation", "the space varies method.name"),
        ("dr_tune=nowhere", "space 'nowhere' is neither a YAML file nor one of"),
    ],
)
def test_planned__spaces_that_are_refused(space: str, message: str) -> None:
    assert message in refused("ce_tuning,dr_tune", space)


def test_planned__all_problems_together() -> None:
    text = refused(
        "ce_tuning,nothing",
        start_with=[{"optim.backbone_lr": 0.001}],
        warm_start=["former"],
        final_fit={"images": "all"},
        finalists={"num_seeds": 0},
    )
    for word in ("start_with", "warm_start", "final_fit", "finalists.num_seeds=0", "nothing.yaml"):
        assert word in text


# ---- ablation, shares and folds


def test_planned__the_ablation_searches_the_same_settings_for_each_part() -> None:
    found = plan("ablation")
    assert list(found.methods.items()) == [
        ("ce_tuning", "ce_tuning"),
        ("dr", "dr"),
        ("dr_rotation", "dr_tune"),
        ("dr_translation", "dr_tune"),
        ("dr_weighted_translation", "dr_tune"),
        ("dr_tune", "dr_tune"),
    ]
    parts = ("rotation", "translation", "confidence_weighting")
    assert [
        tuple(getattr(found.studies[name].trial.method.calibration, part) for part in parts)
        for name in list(found.methods)[2:]
    ] == [(True, False, True), (False, True, False), (False, True, True), (True, True, True)]
    spaces = [read_content(found, name) for name in list(found.methods)[1:]]
    assert all(space == spaces[0] and len(space) == 4 for space in spaces)
    assert set(found.baselines) == set(found.methods) - {"ce_tuning"}


def read_content(found: Comparison, name: str) -> dict[str, Any]:
    content: Any = found.studies[name].space
    return {k: v for k, v in content["parameters"].items() if k != "method.name"}


def test_planned__shares_are_compared_with_their_own_baseline() -> None:
    found = planned(config(), "ce_tuning,dr_tune", shares="0.1,1,0.125", has_seeds=False)
    names = ["100pct", "12.5pct", "10pct"]
    assert list(found.methods) == [f"{m}-{n}" for n in names for m in ("ce_tuning", "dr_tune")]
    assert found.baselines == {f"dr_tune-{name}": f"ce_tuning-{name}" for name in names}
    shares = [study.trial.data.train_share for study in found.studies.values()]
    assert shares == [1.0, 1.0, 0.125, 0.125, 0.1, 0.1]
    assert found.config.finalists.num_seeds == seeds_to_decide(3)
    assert title("dr_tune-12.5pct") == "DR-Tune at 12.5 %"


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("0.1,many", "--shares=0.1,many: 'many' is not a number"),
        ("10,25", "--shares=10,25: 10 is not a share above 0 and up to 1"),
        ("nan", "nan is not a share"),
        ("0", "0 is not a share above 0"),
    ],
)
def test_planned__shares_that_are_refused(shares: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        planned(config(), "ce_tuning,dr_tune", shares=shares)
    assert message in str(error.value)


def test_planned_folds__a_comparison_for_each_fold() -> None:
    found = planned_folds(config(), "ce_tuning,dr_tune", folds=3, repeats=2, has_seeds=False)
    assert found.folder.name == "flowers-compare"
    data = [next(iter(part.studies.values())).trial.data for part in found.parts]
    assert [(d.folds, d.fold, d.fold_seed) for d in data] == [
        (3, fold, seed) for seed in (0, 1) for fold in (0, 1, 2)
    ]
    assert [part.folder.name for part in found.parts[2:4]] == [
        "flowers-fold1.3-compare",
        "flowers-fold2.1-compare",
    ]
    assert found.parts[0].studies["dr_tune"].name == "flowers-fold1.1-dr_tune"
    assert {part.config.finalists.num_seeds for part in found.parts} == {1}
    given = planned_folds(config(), "ce_tuning,dr_tune", folds=2)
    assert given.parts[0].config.finalists.num_seeds == 2


def test_planned_folds__folds_of_the_study_are_refused() -> None:
    data = {"train": "images", "folds": 5}
    with pytest.raises(ConfigError, match="--folds sets the folds of a comparison"):
        planned_folds(config(trial={"data": data}), "ce_tuning,dr_tune", folds=3)


def test_plan_lines__folds_are_one_comparison() -> None:
    folded = planned_folds(config(), "ce_tuning,dr_tune", folds=3, has_seeds=False)
    first, budget, folds = comparison_plan_lines(folded)
    assert first == f"Comparison 'flowers': {folded.folder}"
    assert "1 fresh seed, the same for all" in budget and "each of 3 folds" in folds
