"""How a study stands, from its events: also after a resumption, where others ended before."""

from __future__ import annotations

import pytest

from tests.display.study import Clock, earlier, ended, epoch, events, progress_of, started


def test_take__rows_follow_the_events():
    progress = progress_of(*events(), clock=Clock())
    row = progress.rows()[1]
    assert (row.label, row.epoch, row.value, row.best) == ("3", 4, 0.8532, 0.8632)
    assert progress.rows()[0].label == "2 (ce_tuning)"
    assert [row.number for row in progress.running] == [3, 4, 5, 6]
    assert (progress.num_done, progress.num_trials) == (3, 12)


def test_best__only_what_can_still_win():
    clock = Clock()
    progress = progress_of(*events(), clock=clock)
    assert progress.best is not None and progress.best.number == 3
    progress.take(ended(3, "PRUNED", "diverged"))
    assert progress.best.number == 2
    progress.take(epoch(4, 2, 0.8455, 0.8455))
    assert progress.best.number == 2  # of equals the first


def test_best__trials_of_earlier_runs_count():
    before = [earlier(0, "COMPLETE", 0.9), earlier(1, "PRUNED", 0.95)]
    progress = progress_of(*events(), clock=Clock(), earlier=before)
    assert progress.best is not None and progress.best.label == "0"


def test_epochs_per_minute__of_all_running_trials():
    progress = progress_of(*events(), clock=Clock())
    assert progress.epochs_per_minute == pytest.approx(10 + 5)
    progress.take(ended(4))
    assert progress.epochs_per_minute == pytest.approx(10)
    assert progress_of(clock=Clock()).epochs_per_minute is None


def test_seconds_left__by_the_share_of_epochs():
    clock = Clock()
    progress = progress_of(*events(), clock=clock)
    clock.now += 150
    # 1 trial and 0.4 + 0.1 of others in 150 s; 12 - 3 - 0.5 are left.
    assert progress.seconds_left == pytest.approx(850)


def test_seconds_left__tables_that_are_prepared_first_do_not_count():
    clock = Clock()
    progress = progress_of(clock=clock)
    clock.now += 1000
    for event in events():
        progress.take(event)
    clock.now += 150
    assert progress.seconds_left == pytest.approx(850)


def test_seconds_left__epochs_of_an_earlier_run_are_no_work_of_this_one():
    clock = Clock()
    before = [earlier(2, "RUNNING", 0.8, num_epochs=6), earlier(3, "RUNNING", 0.7, num_epochs=5)]
    progress = progress_of(started(2), clock=clock, earlier=before)
    assert [row.state for row in progress.rows()] == ["RUNNING", "WAITING"]
    for step in range(1, 7):
        progress.take(epoch(2, step, 0.5, 0.5))  # sent again
        assert progress.rows()[0].epoch == 6
    clock.now += 40
    assert progress.seconds_left is None
    progress.take(epoch(2, 10, 0.8, 0.8))
    progress.take(ended(2))
    progress.take(started(3))
    progress.take(epoch(3, 9, 0.8, 0.8))
    # 0.4 and 0.4 in 40 s; 12 - 3 - 0.9 are left.
    assert progress.seconds_left == pytest.approx(40 / 0.8 * 8.1)


def test_summary__nothing_is_left_of_a_study_that_ended():
    progress = progress_of(started(3), ended(3), clock=Clock(), num_trials=3, num_done=2)
    assert "left" not in "; ".join(progress.summary())


def test_shown__the_best_and_the_running_ones_stay():
    progress = progress_of(*events(), clock=Clock())
    for number in range(7, 12):
        progress.take(started(number))
        progress.take(ended(number, "PRUNED"))
    progress.take(ended(3))
    assert [row.number for row in progress.shown(6)] == [3, 4, 5, 6, 10, 11]


def test_distinguishing__searched_paths_in_which_the_rows_differ():
    progress = progress_of(*events(), clock=Clock())
    rows = progress.rows()
    assert list(progress.distinguishing(rows).values()) == [
        "regularization_weight",
        "bank_size",
        "backbone_lr",
    ]
    assert progress.distinguishing(rows[:2]) == {}  # CE-tuning reads no setting of the method
    assert progress.distinguishing(rows[:1]) == {}


def test_take__of_no_trial():
    progress = progress_of(clock=Clock())
    assert progress.take(epoch(7, 1, 0.5, 0.5)) is None
    assert progress.rows() == []


def test_take__an_interruption_is_no_end():
    progress = progress_of(*events(), clock=Clock())
    progress.take(ended(3, "INTERRUPTED", "interrupted"))
    assert progress.num_done == 3
    assert progress.best is not None and progress.best.number == 3
