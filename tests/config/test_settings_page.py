"""Each setting has a text, from which docs/settings.md, ``--help`` and the schema are made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt

from drtune_ray.config.sampler_options import SAMPLER_OPTIONS
from drtune_ray.config.section import Section, Workers, known_paths
from drtune_ray.config.settings_page import (
    choices,
    default_text,
    described,
    field_at,
    setting_table,
    settings_page,
    summary,
)
from drtune_ray.config.study import StudyConfig

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
# "As ...", "Of ...": what begins so does not stand alone.
NOT_ALONE = re.compile(r"(As|At|By|For|From|Of|On|That|To|What|Whether|With)\b")


def fields() -> Iterator[tuple[str, str]]:
    """Path and text of every setting, of the study and of each sampler."""
    for path in known_paths(StudyConfig):
        yield path, field_at(StudyConfig, path).description or ""
    for name, section in SAMPLER_OPTIONS.items():
        for option, field in section.model_fields.items():
            yield f"{name}: {option}", field.description or ""


def problem(text: str) -> str | None:
    """What is wrong with the text of a setting."""
    sentence = re.sub(r"\s*\[[^][]+\]$", "", text)
    if not re.match(r"[A-Z]", sentence) or not sentence.endswith("."):
        return "is no sentence"
    return "does not stand alone" if NOT_ALONE.match(sentence) else None


def test_settings__each_has_a_sentence() -> None:
    assert {path: problem(text) for path, text in fields() if problem(text)} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "is no sentence"),
        ("seed of everything", "is no sentence"),
        ("[eq. 7]", "is no sentence"),
        ("Of everything drawn.", "does not stand alone"),
        ("Random seed. [numpy]", None),
    ],
)
def test_settings__the_check_sees_it(text: str, found: str | None) -> None:
    assert problem(text) == found


def test_page__is_current() -> None:
    remedy = "write it again: python -m drtune_ray.config.settings_page > docs/settings.md"
    assert PAGE.read_text() == settings_page(), remedy


def test_page__has_every_setting() -> None:
    groups = {path.rpartition(".")[0] for path in known_paths(StudyConfig)}
    leaves = [path for path in known_paths(StudyConfig) if path not in groups]
    rows = re.findall(r"^\| `([\w.]+)`", settings_page(), re.MULTILINE)
    num_options = sum(len(section.model_fields) for section in SAMPLER_OPTIONS.values())
    assert sorted(rows[: len(leaves)]) == sorted(leaves)
    assert len(rows) == len(leaves) + num_options


class Example(Section):
    """An example."""

    count: PositiveInt | None = None
    """How many. Default: all. Not read by others.
    [eq. 7; authors' code]"""

    share: Annotated[float, Field(ge=0, lt=1)]
    """Share."""

    word: Literal["a", "b"] = "a"
    """Word, "a" or "b"."""

    workers: Workers = 1
    """One or [min, max]."""

    more: dict[str, int] = {}
    """More."""


def test_table() -> None:
    assert setting_table(Example, "## Example", "group").splitlines()[6:] == [
        "| `group.count` | integer > 0 or null | `null` | How many. Default: all. Not read by "
        "others. | eq. 7; authors' code |",
        "| `group.share` | number >= 0, < 1 | required | Share. |  |",
        '| `group.word` | `a`, `b` | `a` | Word, "a" or "b". |  |',
        "| `group.workers` | integer or [integer, integer] | `1` | One or [min, max]. |  |",
        "| `group.more` | mapping | `{}` | More. |  |",
    ]


def test_summary__first_sentence_and_default() -> None:
    field = Example.model_fields["count"]
    assert summary(field) == "How many. Default: all."
    assert described(field) == (
        "How many. Default: all. Not read by others.",
        "eq. 7; authors' code",
    )


def test_choices_and_default() -> None:
    assert choices(Example.model_fields["word"]) == ("a", "b")
    assert choices(Example.model_fields["count"]) == ()
    texts = {name: default_text(field) for name, field in Example.model_fields.items()}
    assert texts == {"count": "null", "share": "", "word": "a", "workers": "1", "more": "{}"}
