"""The live table: figures are never cut, whatever the width; one line a trial elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from drtune_ray.display import StudyDisplay, duration, percent
from drtune_ray.tracking.events import MetricsRecorded, RunFinished, RunStarted

SEARCHED = ("method.regularization_weight", "method.bank_size", "optim.backbone_lr")
PARAMS = {
    "method.name": "dr_tune",
    "method.regularization_weight": 0.5538746,
    "method.bank_size": 64,
    "optim.backbone_lr": 0.00093,
}


def shown(width: int, is_terminal: bool) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None
    )
    display = StudyDisplay(console, 12, 2, 10, SEARCHED)
    display(RunStarted(2, "trial-0002-ce_tuning", PARAMS | {"method.name": "ce_tuning"}, {}))
    display(RunStarted(3, "trial-0003", PARAMS, {}))
    for number, accuracy in ((2, 0.8455), (3, 0.8632)):
        metrics = {"val_accuracy": accuracy - 0.01, "best_val_accuracy": accuracy}
        display(MetricsRecorded(number, 10, metrics))
    display(RunFinished(2, "COMPLETE", "completed", {}, {}))
    if is_terminal:
        console.print(display._render())
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


@pytest.mark.parametrize("width", [72, 100, 160])
def test_no_figure_is_cut_on_a_terminal(width):
    text = shown(width, is_terminal=True)
    for figure in ("trial-0002-ce_tuning", "complete", "running", "10/10", "83.55 %", "86.32 %"):
        assert figure in text
    assert "3/12" in text
    assert "best so far 86.32 % (trial-0003)"[: width - 60] in text


def test_wide_terminals_show_the_settings():
    text = shown(160, is_terminal=True)
    assert "regularization_weight=0.554 bank_size=64 backbone_lr=0.00093" in text


def test_elsewhere_each_end_is_one_line():
    text = shown(40, is_terminal=False)
    assert text.startswith(
        "[3/12] trial-0002-ce_tuning: best validation accuracy 84.55 % after 10 epochs, completed; "
        "best so far 86.32 % (trial-0003); about "
    )
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3700, "1 h 1 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_percent():
    assert (percent(0.8632), percent(None)) == ("86.32 %", "-")
