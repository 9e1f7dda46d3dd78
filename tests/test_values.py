"""Reading YAML: repeated keys, and lines."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest

from drtune_ray.errors import ConfigError
from drtune_ray.values import LinedDict, LinedList, parse_assignments, read_yaml

CONTENT = """\
# a comment
first: 1
second: &second
  inner: {a: 1,
          b: 2}
  list:
    - x

    - {y: 1}
third:
  <<: *second
  inner: 3
fourth: *second
"""


def written(folder: Path, content: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(content)
    return path


def test_read_yaml__with_lines(tmp_path: Path) -> None:
    path = written(tmp_path, CONTENT)
    content = read_yaml(path, with_lines=True)
    assert isinstance(content, LinedDict)
    assert content.source == str(path)
    assert content.lines == {"first": 2, "second": 3, "third": 10, "fourth": 13}
    second = content["second"]
    assert second.lines == {"inner": 4, "list": 6}
    assert second["inner"].lines == {"a": 4, "b": 5}
    assert isinstance(second["list"], LinedList)
    assert second["list"].lines == [7, 9]
    assert second["list"].source == str(path)
    assert content["third"].lines == {"inner": 12, "list": 6}  # merged: where it stands
    assert content["fourth"] is second


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_read_yaml__lines_survive_a_copy(tmp_path: Path, again: object) -> None:
    content = read_yaml(written(tmp_path, CONTENT), with_lines=True)
    copied = again(content)  # type: ignore[operator]
    assert copied == content
    assert copied.lines == content.lines
    assert copied["second"]["list"].lines == [7, 9]


def test_read_yaml__plain_without_lines(tmp_path: Path) -> None:
    path = written(tmp_path, CONTENT)
    content = read_yaml(path)
    assert type(content) is dict
    assert type(content["second"]["list"]) is list
    assert content == read_yaml(path, with_lines=True)
    assert content["third"] == {"inner": 3, "list": ["x", {"y": 1}]}


@pytest.mark.parametrize("with_lines", [False, True])
def test_read_yaml__repeated_keys(tmp_path: Path, with_lines: bool) -> None:
    path = written(
        tmp_path,
        "trials: 1\nspace:\n  a: {x: 1, x: 2}\n"
        "  b:\n    - y: 1\n      z: 1\n      y: 2\ntrials: 2\n",
    )
    with pytest.raises(ConfigError) as caught:
        read_yaml(path, with_lines=with_lines)
    assert caught.value.problems == (
        f"{path}:3: x is also set on line 3: remove one of them",
        f"{path}:7: y is also set on line 5: remove one of them",
        f"{path}:8: trials is also set on line 1: remove one of them",
    )


def test_read_yaml__a_space_that_repeats_a_parameter(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "parameters:\n  optim.momentum: {float: [0.1, 0.9]}\n  optim.momentum: {constant: 0.9}\n",
    )
    sentence = f"{path}:3: optim.momentum is also set on line 2: remove one of them"
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        read_yaml(path, with_lines=True)


@pytest.mark.parametrize("content", ["a: &a [*a]\n", "a: &a {b: *a}\n"])
def test_read_yaml__an_alias_to_what_holds_it(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, content)
    sentence = f"{path}:1: what begins here contains itself: remove the alias (*) in it"
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        read_yaml(path, with_lines=True)


def test_read_yaml__an_alias_to_what_is_complete(tmp_path: Path) -> None:
    found = read_yaml(written(tmp_path, "a: &a [1]\nb: [*a, *a]\n"), with_lines=True)
    assert found == {"a": [1], "b": [[1], [1]]}


@pytest.mark.parametrize("depth", [60, 1000, 20_000])
def test_read_yaml__nested_too_deep(tmp_path: Path, depth: int) -> None:
    path = written(tmp_path, "a: " + "[" * depth + "]" * depth)
    with pytest.raises(ConfigError, match="more than 50 levels below each other: write it flat"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="^--set a.b(:1)?: more than 50 levels"):
        parse_assignments([f"a.b={'[' * depth}{']' * depth}"])


@pytest.mark.parametrize("content", ["", "# nothing\n", "- 1\n", "word\n"])
def test_read_yaml__no_mapping(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, content)
    sentence = f"{path} must hold a mapping of keys to values"
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        read_yaml(path, with_lines=True)


@pytest.mark.parametrize("content", ["a: [1\n", "a: 1\n---\nb: 2\n", "a: !tag 1\n", "? [1]\n: 2\n"])
def test_read_yaml__no_yaml(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path} is not valid YAML: ')}"):
        read_yaml(path, with_lines=True)
