"""Which trial is next: the user's points, references, samples; and what is not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from drtune_ray.config.trial import TrialConfig
from drtune_ray.execution.ray_tune.searcher import StudySearch
from drtune_ray.results.trials import summaries
from drtune_ray.search.outcomes import Outcomes
from drtune_ray.search.proposals import (
    MAX_UNTRAINED_IN_A_ROW,
    FinalistProposals,
    FixedTrial,
)
from drtune_ray.training.reports import COMPLETED
from tests.search.searches import opened, result, searching

FEW = {
    "parameters": {
        "method.bank_size": {"choice": [8, 16]},
        "optim.nesterov": {"choice": [True, False]},
    }
}


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return opened(tmp_path)


@pytest.fixture
def base(make_trial: Any) -> TrialConfig:
    return make_trial({"method.bank_size": 8})


def proposed(search: StudySearch, name: str) -> dict[str, Any]:
    return json.loads(search.suggest(name)["trial"])


def test_points_of_the_user_come_first_and_what_they_leave_open_is_sampled(study, base):
    points = ({"method.bank_size": 20}, {"optim.backbone_lr": 0.5, "method.bank_size": 9})
    search = searching(study, base, 5, ("default",), start_with=points)
    first, second, third = (proposed(search, name) for name in "abc")
    assert first["method"]["bank_size"] == 20
    assert (second["optim"]["backbone_lr"], second["method"]["bank_size"]) == (0.5, 9)
    assert study.trials[2].user_attrs["reference"] == "default"
    again = searching(study, base, 5, ("default",), start_with=points)
    assert [again.suggest(name)["number"] for name in "abc"] == [0, 1, 2]  # the unfinished ones
    again.suggest("d")
    assert not {"start_point", "reference"} & study.trials[3].user_attrs.keys()


def test_a_point_is_not_trained_twice(study, base):
    search = searching(study, base, 10, space=FEW)
    seen = []
    for index in range(4):
        seen.append(proposed(search, str(index)))
        search.on_trial_complete(str(index), result([0.5], COMPLETED))
    assert len({json.dumps(config) for config in seen}) == 4
    assert search.suggest("more") == "FINISHED"
    assert search.proposals.end.endswith("the search space holds no more")
    duplicates = [t for t in study.trials if "not_trained" in t.user_attrs]
    assert len(duplicates) >= MAX_UNTRAINED_IN_A_ROW
    assert {t.state for t in duplicates} == {TrialState.FAIL}
    assert all(t.user_attrs["not_trained"].startswith("duplicate of trial") for t in duplicates)
    assert len(summaries(study.trials)) == 4


def test_a_reference_in_the_space_is_not_sampled_again(study, base):
    search = searching(study, base, 9, ("default",), space=FEW)
    configs = [proposed(search, str(index)) for index in range(4)]
    assert len({json.dumps(config) for config in configs}) == 4


def test_a_given_trial_that_failed_is_made_good_at_its_own_point(study, base):
    """And a reference that equals a point of the user's own has its parameters too."""
    point = {"method.bank_size": 8, "optim.backbone_lr": 0.001}  # the default's
    for number in range(2):
        search = searching(study, base, 2, ("default",), start_with=(point,))
        for name in ("a", "b"):
            search.suggest(name)
            assert study.trials[-1].params == point, number
            if number == 0:
                search.fail(name, "process killed")


def finalists(study: optuna.Study, base: TrialConfig, *seeds: int) -> StudySearch:
    runs = (FixedTrial(f"seed {seed}", base.with_values({"seed": seed})) for seed in seeds)
    return StudySearch(FinalistProposals(study, tuple(runs)), Outcomes(study))


def test_finalists_are_no_part_of_the_search_and_are_resumed(study, base):
    told = searching(study, base, 1)
    told.suggest("a")
    told.on_trial_complete("a", result([0.5], COMPLETED))
    search = finalists(study, base, 1, 2, 3)
    assert proposed(search, "b")["seed"] == 1
    search.on_trial_complete("b", result([0.6], COMPLETED))
    assert proposed(search, "c")["seed"] == 2  # and its driver is killed
    again = finalists(study, base, 1, 2, 3)
    assert again.suggest("d")["number"] == 2
    again.on_trial_complete("d", result([0.7], COMPLETED))
    assert proposed(again, "e")["seed"] == 3
    again.fail("e", "process killed")
    assert again.suggest("f") == "FINISHED"
    assert finalists(study, base, 1, 2, 3).proposals.has_next()
    assert study.trials[3].params == {}
    more = searching(study, base, 2)
    assert more.suggest("g")["number"] == 4 and more.suggest("h") == "FINISHED"


def test_what_was_cut_off_is_not_taken_for_something_else(study, base, monkeypatch):
    search = finalists(study, base, 1)

    def cut_off(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrialConfig, "to_mapping", cut_off)
        search.suggest("a")
    assert study.trials[0].user_attrs == {"finalist": "seed 1"}
    other = searching(study, base, 1)
    assert other.suggest("b")["number"] == 1
    assert study.trials[0].state == TrialState.FAIL
    assert [trial.number for trial in summaries(study.trials)] == [1]
