"""Earlier trials for the sampler: which fit, why others do not, and that they stay strangers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from drtune_ray.config.trial import TrialConfig
from drtune_ray.results.trials import summaries
from drtune_ray.search.warm_start import add_earlier_trials
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.storage.fingerprint import DATA_DIGEST, NUMERICS, WEIGHTS_DIGEST
from drtune_ray.storage.record import Record
from drtune_ray.training.reports import COMPLETED, DIVERGED
from tests.search.searches import SPACE, opened, result, searching

DECIDING = {DATA_DIGEST: "a", WEIGHTS_DIGEST: "b", NUMERICS: 2, "objectives": ["val_accuracy"]}


@pytest.fixture
def base(make_trial: Any) -> TrialConfig:
    return make_trial({"method.bank_size": 32})


@pytest.fixture
def earlier(tmp_path: Path, base: TrialConfig) -> tuple[Record, Any]:
    """Four trials: of the space, with a smaller bank, one that diverged, one that is cut off."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    search = searching(opened(folder), base, 9, ("default", "ce_tuning"))
    for name, told in (
        ("a", result([0.5, 0.6], COMPLETED)),
        ("b", result([0.9], COMPLETED)),
        ("c", result([0.3])),
        ("d", result([], DIVERGED)),
    ):
        search.suggest(name)
        search.on_trial_complete(name, told)
    search.suggest("e")
    record = Record(folder, "earlier-1", "study", {}, DECIDING, {})
    return record, search.study.get_trials()


def present(tmp_path: Path) -> optuna.Study:
    folder = tmp_path / "present"
    folder.mkdir(exist_ok=True)
    return opened(folder)


def test_what_fits_is_copied_once_and_is_no_trial_of_the_study(earlier, tmp_path, base):
    study, space = present(tmp_path), SearchSpace.from_mapping(SPACE, base)
    for _ in range(2):
        (said,) = add_earlier_trials(study, [earlier], DECIDING, space, base)
        assert said == (
            "warm start from 'earlier': 3 trials; 1 left out: method.name='ce_tuning' is "
            "'dr_tune' here"
        )
    copies = study.get_trials()
    assert [trial.state for trial in copies] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.PRUNED,
    ]
    assert copies[0].value == 0.6 and copies[0].intermediate_values == {1: 0.5, 2: 0.6}
    assert copies[0].params == {"optim.backbone_lr": 0.001, "method.bank_size": 32}
    assert copies[2].constraints == {"trains": 1.0}
    assert summaries(copies) == ()
    search = searching(study, base, 1)
    assert search.suggest("a")["number"] == 3 and search.suggest("b") == "FINISHED"


def test_another_range_leaves_out_what_lies_outside(earlier, tmp_path, base):
    narrow = {"parameters": {"optim.backbone_lr": {"float": [1e-4, 1.0], "log": True}}}
    wide = SearchSpace.from_mapping(narrow, base)
    (said,) = add_earlier_trials(present(tmp_path), [earlier], DECIDING, wide, base)
    assert said.startswith("warm start from 'earlier': 1 trials; ")
    assert "method.bank_size=" in said and "is 32 here" in said


@pytest.mark.parametrize("key", [DATA_DIGEST, WEIGHTS_DIGEST, NUMERICS, "objectives"])
def test_results_that_cannot_be_compared_are_refused(earlier, tmp_path, base, key):
    study, space = present(tmp_path), SearchSpace.from_mapping(SPACE, base)
    (said,) = add_earlier_trials(study, [earlier], DECIDING | {key: "other"}, space, base)
    assert said == f"warm start from 'earlier': no trial is comparable, since it has other {key}"
    assert study.get_trials() == []


def test_the_sampler_learns_from_them(earlier, tmp_path, base):
    """Its first proposals are no longer drawn at random."""
    study, space = present(tmp_path), SearchSpace.from_mapping(SPACE, base)
    many = [told(base, 10 ** (-4 + index / 5)) for index in range(20)]
    add_earlier_trials(study, [(earlier[0], many)], DECIDING, space, base)
    assert len(study.get_trials()) == 20
    search = searching(study, base, 6)
    rates = [json.loads(search.suggest(str(n))["trial"])["optim"]["backbone_lr"] for n in range(6)]
    # These six would be drawn at random, whose median is 0.01.
    assert statistics.median(rates) > 0.1, rates


def told(base: TrialConfig, rate: float) -> optuna.trial.FrozenTrial:
    """An earlier trial that is the better, the higher its rate."""
    values = {"optim.backbone_lr": rate, "method.bank_size": 32}
    asked = optuna.trial.FixedTrial(values)
    SearchSpace.from_mapping(SPACE, base).suggest(asked, base)
    return optuna.trial.create_trial(
        value=rate,
        params=values,
        distributions=asked.distributions,
        user_attrs={"config": json.dumps(base.with_values(values).to_mapping())},
    )
