"""ASHA by epoch: references are not seen, rungs are refilled from what Optuna recorded."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from drtune_ray.config.study import SchedulerConfig
from drtune_ray.execution.ray_tune.schedulers import StudyScheduler, build_scheduler
from drtune_ray.training.reports import HISTORY, OBJECTIVE

BEST = "best_val_accuracy"
CONFIG = SchedulerConfig(min_epochs=1, reduction_factor=2)
CURVES = {
    0: [0.9, 0.9, 0.9, 0.9],
    1: [0.5, 0.6, 0.7, 0.8],
    2: [0.4, 0.5, 0.6, 0.7],
    3: [0.6, 0.7, 0.8, 0.9],
    4: [0.55, 0.56, 0.57, 0.58],
    5: [0.7, 0.71, 0.72, 0.73],
}


def tune_trial(number: int) -> SimpleNamespace:
    return SimpleNamespace(config={"number": number}, trial_id=f"tune-{number}")


def scheduler(
    references: set[int], config: SchedulerConfig = CONFIG, max_epochs: int = 4
) -> StudyScheduler:
    built = build_scheduler(config, max_epochs, references)
    assert built is not None
    return built


def run(asha: StudyScheduler, numbers: list[int]) -> dict[int, int]:
    """Epochs that each trial was given."""
    given = {}
    for number in numbers:
        asha.on_trial_add(None, tune_trial(number))
        for epoch, value in enumerate(CURVES[number], start=1):
            result: dict[str, Any] = {"epoch": epoch, OBJECTIVE: value, "outcome": ""}
            given[number] = epoch
            if epoch == 4 or asha.on_trial_result(None, tune_trial(number), result) == "STOP":
                asha.on_trial_complete(None, tune_trial(number), result)
                break
    return given


def rungs(asha: StudyScheduler) -> list[Any]:
    return [bracket._rungs for bracket in asha.rule._brackets]


def recorded(
    numbers: list[int], given: dict[int, int], state: TrialState = TrialState.PRUNED
) -> list[FrozenTrial]:
    return [
        FrozenTrial(
            number=number,
            state=state,
            value=None,
            datetime_start=None,
            datetime_complete=None,
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values=dict(enumerate(CURVES[number][: given[number]], start=1)),
            trial_id=number,
        )
        for number in numbers
    ]


def test_it_stops_the_worse_half_at_each_rung():
    assert run(scheduler({0}), [1, 2, 3, 4, 5]) == {1: 4, 2: 1, 3: 4, 4: 2, 5: 4}


def test_references_run_to_the_end_and_leave_no_trace():
    asha = scheduler({0})
    assert run(asha, [0]) == {0: 4}
    assert all(not recorded for _, recorded in rungs(asha)[0])


@pytest.mark.parametrize("num_before", [1, 2, 3, 4])
def test_rungs_after_a_crash_are_what_they_were(num_before):
    unbroken = scheduler({0})
    before, after = [1, 2, 3, 4, 5][:num_before], [1, 2, 3, 4, 5][num_before:]
    given = run(unbroken, before)
    resumed = scheduler({0})
    resumed.refill(recorded([0], {0: 4}) + recorded(before, given))
    assert rungs(resumed) == rungs(unbroken)
    assert run(resumed, after) == run(unbroken, after)


def report(scheduler: StudyScheduler, number: int, *epochs: int) -> str:
    """Report the last of some epochs of a trial; the result holds the others."""
    curve = CURVES[number]
    history = [
        {"epoch": e, "time_ms": 0, "metrics": {BEST: curve[e - 1]}, "steps": []} for e in epochs
    ]
    result = {"epoch": epochs[-1], OBJECTIVE: curve[epochs[-1] - 1], HISTORY: json.dumps(history)}
    return scheduler.on_trial_result(None, tune_trial(number), result)


def entered(asha: StudyScheduler, number: int) -> dict[int, float]:
    """The values of a trial at the rungs."""
    name = str(number)
    return {epoch: values[name] for epoch, values in rungs(asha)[0] if name in values}


def test_a_resumed_trial_is_not_entered_twice():
    asha = scheduler(set())
    asha.refill(recorded([1], {1: 3}, TrialState.RUNNING))
    asha.on_trial_add(None, tune_trial(1))
    assert entered(asha, 1) == {1: 0.5, 2: 0.6}
    for epoch in (2, 3):  # as from a checkpoint of the first epoch
        assert report(asha, 1, *range(1, epoch + 1)) == "CONTINUE"
        assert entered(asha, 1) == {1: 0.5, 2: 0.6}


@pytest.mark.parametrize("name", ["asha", "median"])
def test_an_epoch_is_decided_when_the_driver_died_before_it_was(name):
    config = SchedulerConfig(name=name, min_epochs=1, min_trials=1, reduction_factor=2)
    resumed = scheduler(set(), config)
    resumed.refill(recorded([1, 3], {1: 4, 3: 4}) + recorded([2], {2: 1}, TrialState.RUNNING))
    resumed.on_trial_add(None, tune_trial(2))
    assert report(resumed, 2, 1) == "STOP"


def test_an_epoch_that_a_trial_is_beyond_had_been_let_pass():
    """Other trials have reported since then; what they did decides nothing in hindsight."""
    asha = scheduler(set())
    asha.refill(recorded([1, 3], {1: 4, 3: 4}) + recorded([2], {2: 1}, TrialState.RUNNING))
    asha.on_trial_add(None, tune_trial(2))
    asha.rule._brackets[0]._rungs[-2][1].clear()  # nobody else was at the second rung
    assert report(asha, 2, 1, 2) == "CONTINUE"
    assert entered(asha, 2) == {1: 0.4, 2: 0.5}


def test_an_epoch_that_no_driver_saw_is_decided():
    """A rung was skipped when a trial came with two new epochs at once."""
    asha = scheduler(set())
    asha.refill(recorded([1, 3], {1: 1, 3: 1}) + recorded([2], {2: 0}, TrialState.RUNNING))
    asha.on_trial_add(None, tune_trial(2))
    assert report(asha, 2, 1, 2) == "STOP"
    assert entered(asha, 2) == {1: 0.4, 2: 0.5}


def test_the_median_rule_counts_an_epoch_once():
    config = SchedulerConfig(name="median", min_epochs=1, min_trials=1)
    median = scheduler(set(), config)
    median.on_trial_add(None, tune_trial(1))
    for epochs in ([1], [1, 2], [1], [1, 2], [1, 2, 3]):
        report(median, 1, *epochs)
    (results,) = median.rule._results.values()
    assert [result["epoch"] for result in results] == [1, 2, 3]


def test_a_trial_without_an_epoch_leaves_no_value():
    asha = scheduler(set())
    asha.on_trial_add(None, tune_trial(1))
    asha.on_trial_complete(None, tune_trial(1), {"epoch": 0, OBJECTIVE: float("nan")})
    assert all(not values for _, values in rungs(asha)[0])


@pytest.mark.parametrize(
    ("min_epochs", "max_epochs", "expected"),
    [(None, 12, 4), (None, 10, 3), (None, 4, 2), (None, 1, 1), (5, 12, 5), (20, 12, 12)],
)
def test_the_first_rung_is_at_a_third_of_the_epochs_unless_it_is_given(
    min_epochs, max_epochs, expected
):
    config = SchedulerConfig(min_epochs=min_epochs)
    assert config.first_rung(max_epochs) == expected
    (bracket,) = scheduler(set(), config, max_epochs).rule._brackets
    assert min(milestone for milestone, _ in bracket._rungs) == expected


def test_the_median_rule_stops_after_a_crash_what_it_would_have_stopped():
    config = SchedulerConfig(name="median", min_epochs=1, min_trials=2)
    unbroken, resumed = scheduler({0}, config), scheduler({0}, config)
    given = run(unbroken, [1, 3, 5])
    # Trial 4 equals the median of the means at epoch 1 (0.55) and is below it (0.65) at epoch 2.
    resumed.refill(recorded([0], {0: 4}) + recorded([1, 3, 5], given))
    expected = run(unbroken, [2, 4])
    assert run(resumed, [2, 4]) == expected == {2: 1, 4: 2}
    assert run(resumed, [0]) == {0: 4}
