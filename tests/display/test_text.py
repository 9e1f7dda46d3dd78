from __future__ import annotations

import io

import pytest

from drtune_ray.display import duration, percent
from drtune_ray.display.text import Command, folded, packed, short, short_names, size, wrapped


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (0.4, "0 s"),
        (59, "59 s"),
        (61, "1 min 1 s"),
        (3700, "1 h 1 min"),
        (90061, "1 d 1 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_wrapped__between_words_and_no_command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    line = "  12 trials (3 reference trials first), /a/path/that/is/longer/than/the/line at a time"
    assert wrapped(line, Terminal()).splitlines() == [
        "  12 trials (3 reference",
        "    trials first),",
        "    /a/path/that/is/longer/than/the/line",
        "    at a time",
    ]
    assert wrapped("short\n\nand short", Terminal()) == "short\n\nand short"
    assert wrapped(Command(line), Terminal()) == line
    assert wrapped(line, io.StringIO()) == line


def test_percent():
    assert (percent(0.8632), percent(None)) == ("86.32 %", "-")


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")]
)
def test_size(num_bytes, text):
    assert size(num_bytes) == text


def test_short():
    values = [None, True, False, 0.0001234, 4096, "cosine"]
    assert [short(v) for v in values] == ["-", "yes", "no", "0.000123", "4096", "cosine"]


def test_short_names__as_long_as_they_must_be():
    paths = ["optim.name", "method.name", "method.calibration.rotation", "optim.lr", "lr"]
    assert short_names(paths) == {
        "optim.name": "optim.name",
        "method.name": "method.name",
        "method.calibration.rotation": "rotation",
        "optim.lr": "optim.lr",
        "lr": "lr",
    }


def test_folded__breaks_behind_underscores_only():
    assert folded("regularization_weight", 10) == ["regularization_", "weight"]
    assert folded("head_lr_multiplier", 10) == ["head_lr_", "multiplier"]
    assert folded("bank_size", 10) == ["bank_size"]


def test_packed__breaks_no_segment():
    assert packed(["best 86.32 %", "about 3 min left", "x"], 18, gap="  ") == [
        "best 86.32 %",
        "about 3 min left",
        "x",
    ]
    assert packed(["a", "b", "c"], 4, gap=" ") == ["a b", "c"]
