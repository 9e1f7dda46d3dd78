"""What reaches stdout and stderr in each mode."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from drtune_ray.display.outputs import (
    STOPPING,
    JsonLines,
    People,
    Quiet,
    TrainingLines,
    is_live,
    json_stdout,
    write_json,
)
from drtune_ray.errors import ConfigError
from drtune_ray.tracking.events import RunFinished, StepsRecorded
from tests.display.study import Clock, ended, epoch, events, progress_of, started


def people(clock: Clock, *, live: bool = False) -> tuple[People, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=live, color_system=None)
    return People(console, is_live=live, clock=clock), stream


def test_people__elsewhere_each_end_is_one_line():
    clock = Clock()
    output, stream = people(clock)
    output.plan(progress_of(clock=clock), {})
    for event in events():
        output.take(event)
    clock.now += 10
    output.take(ended(4, "PRUNED", "stopped by the scheduler"))
    first, second = stream.getvalue().splitlines()
    assert first == (
        "[3/12] trial 2 (ce_tuning): best validation accuracy 84.55 % after 10 epochs, completed; "
        "best so far 84.55 %, trial 2 (ce_tuning); about 0 s left"
    )
    assert second.startswith(
        "[4/12] trial 4: best validation accuracy 25.00 % after 1 epochs, stopped by the "
        "scheduler; best so far 86.32 %, trial 3; 10 epochs/min; about "
    )


def test_people__elsewhere_a_line_a_minute_says_how_it_stands():
    clock = Clock()
    output, stream = people(clock)
    output.plan(progress_of(clock=clock), {})
    for event in (started(3), started(4)):
        output.take(event)
    for step in range(1, 8):
        clock.now += 25
        output.take(epoch(3, step, 0.5, 0.5 + step / 100, seconds=25.0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # at 75 s and at 150 s
    assert lines[0] == (
        "[2/12] running: 3 (epoch 3, best 53.00 %), 4 (epoch 0, best -); best so far 53.00 %, "
        "trial 3; 2.4 epochs/min; time left unknown"
    )


def test_people__a_terminal_gets_a_table_that_stays():
    clock = Clock()
    output, stream = people(clock, live=True)
    output.plan(progress_of(clock=clock), {})
    for event in events():
        output.take(event)
    output.notice("waiting for 1 CPU")
    output.close()
    text = stream.getvalue()
    assert "waiting for 1 CPU\n" in text
    assert "[3/12]" not in text
    assert text.endswith("about 0 s left\n\x1b[?25h")  # the cursor is back
    output.close()  # a second time changes nothing
    assert stream.getvalue() == text


def test_people__an_interruption_is_said_above_the_table(capsys):
    clock = Clock()
    output, stream = people(clock, live=True)
    output.plan(progress_of(clock=clock), {})
    output.take(RunFinished(3, "INTERRUPTED", "interrupted", {}, {}))
    output.close()
    assert STOPPING + "\n" in stream.getvalue()
    assert capsys.readouterr().err == ""


def test_people__what_is_said_is_not_markup():
    output, stream = people(Clock())
    output.say("[red]space[/red]=[1, 2] " + "x" * 200)
    assert stream.getvalue() == "[red]space[/red]=[1, 2] " + "x" * 200 + "\n"


def test_quiet__nothing_but_warnings_on_stderr(capsys):
    output = Quiet()
    output.say("Defaults for this machine")
    output.plan(progress_of(clock=Clock()), {})
    for event in events():
        output.take(event)
    output.notice("waiting for 1 CPU")
    assert tuple(capsys.readouterr()) == ("", "waiting for 1 CPU\n")


@pytest.mark.parametrize("output", [Quiet(), JsonLines(io.StringIO()), TrainingLines(3)])
def test_an_interruption_is_said_once_when_it_comes(capsys, output):
    for number in (3, 4, None):
        output.take(RunFinished(number, "INTERRUPTED", "interrupted", {}, {}))
    output.take(ended(5, "FAIL"))
    assert capsys.readouterr().err == STOPPING + "\n"


def test_training_lines__one_an_epoch(capsys):
    output = TrainingLines(10)
    output.say("Defaults")
    event = epoch(3, 4, 0.8532, 0.8632)
    event.metrics["loss"] = 1.25  # type: ignore[union-attr]
    output.take(event)
    output.take(replace(event, step=3, time_ms=1000))  # of an earlier run
    output.take(ended(3))
    expected = "Defaults\nepoch 4/10  loss 1.2500  validation 85.32 %  6.0 s\n"
    assert capsys.readouterr().out == expected


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines__one_object_an_event():
    stream = io.StringIO()
    output = JsonLines(stream)
    output.say("Defaults")
    output.plan(progress_of(clock=Clock()), {"study": "flowers", "num_trials": 12})
    for event in events()[:6]:
        output.take(event)
    output.take(StepsRecorded(3, 1, [{"loss": 1.0}], 5))
    found = lines_of(stream)
    assert [line["kind"] for line in found] == [
        "notice",
        "study_planned",
        *["run_started"] * 4,
        "metrics_recorded",
        "run_finished",
    ]
    assert all(line["time"].endswith("Z") and len(line["time"]) == 24 for line in found)
    assert found[1]["num_trials"] == 12
    assert found[2]["number"] == 2
    assert found[2]["params"]["method.bank_size"] == 64
    assert (found[6]["step"], found[6]["metrics"]["best_val_accuracy"]) == (10, 0.8455)
    assert "time_ms" not in found[6]


def test_write_json__the_time_of_the_event():
    stream = io.StringIO()
    write_json(stream, "x", {"number": 1}, 1_700_000_000_123)
    assert lines_of(stream) == [{"kind": "x", "time": "2023-11-14T22:13:20.123Z", "number": 1}]


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ConfigError("trials=0 is not valid"), 2, "trials=0 is not valid"),
        (KeyboardInterrupt(), 130, "interrupted: repeat the command to resume"),
    ],
)
def test_json_stdout__an_error_is_the_last_line(capsys, error, code, reason):
    with pytest.raises(type(error)), json_stdout(is_wanted=True) as stream:
        print("somebody else's")
        write_json(stream, "notice", {"text": "x"})
        raise error
    said = capsys.readouterr()
    first, last = (json.loads(line) for line in said.out.splitlines())
    assert first["kind"] == "notice"
    assert (last["kind"], last["exit_code"], last["reason"]) == ("result", code, reason)
    assert said.err == "somebody else's\n"


def test_json_stdout__not_wanted(capsys):
    with pytest.raises(ConfigError), json_stdout(is_wanted=False):
        print("as ever")
        raise ConfigError("wrong")
    assert tuple(capsys.readouterr()) == ("as ever\n", "")


@pytest.mark.parametrize(
    ("is_terminal", "environment", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_is_live(is_terminal, environment, expected):
    terminal = {"TERM": "xterm"} | environment
    console = Console(file=io.StringIO(), force_terminal=is_terminal, _environ=terminal)
    assert is_live(console, environment) is expected
