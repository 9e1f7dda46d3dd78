"""Every rule about input has an example that breaks it, with the exact message, and code 2."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from drtune_ray.cli import cli, main
from drtune_ray.config import StudyConfig
from tests import bad_places
from tests.bad_input import Example, all_examples
from tests.rules import (
    PACKAGE,
    Rule,
    option_rules,
    refuses,
    sentence_rules,
    setting_rules,
    without_example,
)
from tests.small import BACKBONE, write_coloured

EXAMPLES = all_examples()
STORAGE = "drtune-studies"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory, weights_file: Callable[[str], Path]) -> Path:
    """What lies in the folder of every example."""
    folder = tmp_path_factory.mktemp("bad-input") / "here"
    write_coloured(folder / "images", per_class=6)
    shutil.copy(weights_file(BACKBONE), folder / "weights.safetensors")
    return folder


@pytest.fixture
def here(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(pristine, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


def prepare(example: Example, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if example.file is not None:
        shutil.copy(example.file, here)
    for name in example.needs:
        getattr(bad_places, name)(here, monkeypatch)


def content(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(
    example: Example,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(example, here, monkeypatch)
    before = content(here)
    monkeypatch.setattr(sys, "argv", ["drtune-ray", *example.arguments])
    # As the program has it: click names it after the module that was started.
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None, raising=False)
    monkeypatch.setattr("ray.init", started)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert said.err == example.expected(here)
    assert end.value.code == 2
    assert "Traceback" not in said.out
    assert content(here) == before


def started(*arguments: object, **options: object) -> None:
    pytest.fail("Ray would have been started")
