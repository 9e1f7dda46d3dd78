"""The plan of a comparison: the same budget for every method, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drtune_ray.config.study import StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.study.comparison_plan import Comparison, planned


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
    assert (found.folder.name, found.baseline) == ("flowers-compare", "ce_tuning")
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
