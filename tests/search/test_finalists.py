"""Who comes to the finals, on which seeds, and who wins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from drtune_ray.config.study import FinalistsConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.results.trials import TrialSummary
from drtune_ray.search.finalists import best_finalist, finalists, repetitions


@pytest.fixture
def trial(make_trial: Any) -> Any:
    def make(
        number: int, accuracy: float, state: str = "COMPLETE", values: dict[str, Any] | None = None
    ) -> TrialSummary:
        config = make_trial({"optim.backbone_lr": 0.001 * (number + 1)} | (values or {}))
        return TrialSummary(number, state, "", None, accuracy, 3, 1.0, config.to_mapping())

    return make


@pytest.fixture
def searched(trial: Any) -> list[TrialSummary]:
    return [
        trial(0, 0.70),
        trial(1, 0.60, values={"method.name": "ce_tuning"}),
        trial(2, 0.95, "PRUNED"),
        trial(3, 0.90),
        trial(4, 0.65, values={"method.name": "ce_tuning"}),
        trial(5, 0.80),
    ]


def run(trials: list[TrialSummary], *accuracies: float | None) -> list[TrialSummary]:
    """The repetitions as they would be trained; None is one that diverged."""
    wanted = repetitions(finalists(trials, FinalistsConfig()))
    assert len(wanted) == len(accuracies)
    return trials + [
        TrialSummary(
            10 + index,
            "PRUNED" if accuracy is None else "COMPLETE",
            "",
            None,
            accuracy,
            3,
            1.0,
            repetition.config.to_mapping(),
            repetition.name,
        )
        for index, (repetition, accuracy) in enumerate(zip(wanted, accuracies, strict=True))
    ]


def test_the_best_completed_and_the_best_ce_tuning(searched):
    chosen = finalists(searched, FinalistsConfig())
    assert [finalist.source.number for finalist in chosen] == [3, 5, 4]
    assert finalists(searched, FinalistsConfig(num_seeds=0)) == ()
    one = finalists([searched[4]], FinalistsConfig())
    assert [finalist.source.number for finalist in one] == [4]  # CE-tuning once


def test_seeds_are_new_and_paired(searched):
    wanted = repetitions(finalists(searched, FinalistsConfig()))
    seeds = [(r.config.seed, r.config.data.view_seed) for r in wanted]
    assert seeds == [(1, 1)] * 3 + [(2, 2)] * 3
    assert len({r.name for r in wanted}) == 6
    source = TrialConfig.from_mapping(searched[3].config)
    assert wanted[0].config == source.with_values({"seed": 1, "data.view_seed": 1})


def test_the_best_mean_wins_and_its_best_seed_ships(searched):
    trials = run(searched, 0.80, 0.85, 0.50, 0.82, 0.83, 0.99)
    chosen = finalists(trials, FinalistsConfig())
    best = best_finalist(chosen)
    assert best.source.number == 5 and best.mean == pytest.approx(0.84)
    assert best.spread == pytest.approx(0.0141421, abs=1e-6)
    assert best.best_run.number == 11
    assert [finalist.source.number for finalist in chosen] == [3, 5, 4]  # not what they reached


def test_one_that_diverged_on_a_seed_cannot_win(searched):
    trials = run(searched, 0.80, 0.99, 0.50, 0.82, None, 0.52)
    best = best_finalist(finalists(trials, FinalistsConfig()))
    assert best.source.number == 3
    nobody = run(searched, None, None, None, 0.8, 0.8, 0.8)
    assert best_finalist(finalists(nobody, FinalistsConfig())) is None


def test_repetitions_of_another_configuration_do_not_count(searched):
    trials = run(searched, 0.80, 0.85, 0.50, 0.82, 0.83, 0.99)
    better = [*trials, replace(searched[3], number=20, best_value=0.99)]
    chosen = finalists(better, FinalistsConfig())
    assert [(f.source.number, len(f.runs)) for f in chosen] == [(20, 0), (3, 2), (4, 2)]
