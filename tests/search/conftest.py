"""Studies that are hit, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.search.survival import Killed


@pytest.fixture
def killed(tmp_path: Path, weights_file: Any) -> Iterator[Any]:
    """Makes studies; whatever happens, their processes are gone afterwards."""
    made: list[Killed] = []

    def make(folder: Path = tmp_path, kind: type[Killed] = Killed, **changes: Any) -> Killed:
        made.append(kind(folder, weights_file, **changes))
        return made[-1]

    yield make
    for study in made:
        study.end()
