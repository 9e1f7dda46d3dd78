"""The live table: at no width a figure is cut; what has no room is left out and counted."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from drtune_ray.display.live_table import rendered
from tests.display.study import Clock, earlier, events, progress_of


def shown(width: int, height: int = 40, **changes: object) -> str:
    clock = Clock()
    progress = progress_of(*events(), clock=clock, **changes)
    clock.now += 150
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(rendered(progress, width, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_drawn__no_figure_is_cut(width):
    text = shown(width)
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= width
    assert "…" not in text
    row = next(line for line in lines if line.startswith("3 "))
    for figure in ("running", " 4/10", "85.32 %", "86.32 %"):
        assert figure in row
    for figure in ("2 (ce_tuning)", "complete", "3/12 trials", "best so far 86.32 %, trial 3"):
        assert figure in text
    assert "15 epochs/min" in text
    assert "about 14 min 10 s left" in text


def test_drawn__wide_terminals_show_the_settings_that_differ():
    text = shown(100)
    assert re.search(r"^ +regularization_ +backbone_ *$", text, re.M)
    assert re.search(r"^trial .* accuracy +best +weight +bank_size +lr *$", text, re.M)
    assert re.search(r"^4 .* 25\.00 % +0\.554 +4096 +0\.00093 *$", text, re.M)
    assert re.search(r"^2 \(ce_tuning\) .* 84\.55 % +- +- +0\.00093 *$", text, re.M)
    assert "weight_decay" not in text
    assert "hidden" not in text


def test_drawn__what_has_no_room_is_counted():
    assert "2 columns hidden: widen the terminal" in shown(60)
    assert "1 column hidden: widen the terminal" in shown(80)


def test_drawn__forty_columns_hold_trial_state_epoch_and_best():
    text = shown(40)
    assert max(len(line) for line in text.splitlines()) <= 40
    assert re.search(r"^3 +running +4/10 +86\.32 % *$", text, re.M)


def test_drawn__a_low_terminal_shows_fewer_rows():
    before = [earlier(number, "PRUNED", 0.5) for number in range(2)]
    assert len(shown(100, 40, earlier=before).splitlines()) == 11
    low = shown(100, 12, earlier=before)
    assert [line.split()[0] for line in low.splitlines()[2:6]] == ["3", "4", "5", "6"]


def test_drawn__before_the_first_trial():
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    console.print(rendered(progress_of(clock=Clock()), 60, 40))
    assert isinstance(console.file, io.StringIO)
    assert "2/12 trials" in console.file.getvalue()
