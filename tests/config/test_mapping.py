"""Mappings of studies as records hold them: a study begun earlier resumes only where none changes.

A new setting adds its default to mappings.json (and to every record: `storage.fingerprint` compares
the deciding ones). A changed value or a missing key refuses every study begun before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drtune_ray.config.study import StudyConfig
from drtune_ray.values import flattened

# Written by the package before its settings had texts; by case what is given and what is recorded.
CASES: dict[str, Any] = json.loads(Path(__file__).with_name("mappings.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_to_mapping__is_what_records_hold(case: str) -> None:
    own = CASES[case]["recorded"]
    groups = {path.rsplit(".", end)[0] for path in own for end in range(1, path.count(".") + 1)}
    recorded = {p: v for p, v in CASES["default"]["recorded"].items() if p not in groups} | own
    mapping = StudyConfig.from_mapping(CASES[case]["given"]).to_mapping()
    # As text: 1 and 1.0 are equal, but give different hashes.
    found = {path: json.dumps(value) for path, value in flattened(mapping).items()}
    assert found == {path: json.dumps(value) for path, value in recorded.items()}
    assert StudyConfig.from_mapping(mapping).to_mapping() == mapping
