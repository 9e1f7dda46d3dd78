"""Losses of each preset, step by step, as they were: see `golden.py`."""

import json

import pytest

from tests.method.golden import FILE, PRESETS, golden_losses


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_are_those_on_file(preset):
    expected = json.loads(FILE.read_text())[preset]
    found = golden_losses(preset)
    assert len(found) == len(expected) in (22, 24)
    for step, (row, row_on_file) in enumerate(zip(found, expected, strict=True)):
        assert row == pytest.approx(row_on_file, rel=1e-9), f"step {step}"


def test_the_presets_differ():
    on_file = json.loads(FILE.read_text())
    assert sorted(on_file) == sorted(PRESETS)
    last = [on_file[preset][-1][0] for preset in PRESETS]
    assert len({round(loss, 3) for loss in last}) == len(PRESETS)
