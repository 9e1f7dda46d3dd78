from __future__ import annotations

import inspect
import pickle

import pytest

from drtune_ray import errors
from drtune_ray.errors import (
    CheckpointError,
    ConfigError,
    DrtuneError,
    EnvironmentProblem,
    NoTrialCompleted,
    first_line,
)

ALL = sorted(
    (
        error
        for error in vars(errors).values()
        if inspect.isclass(error) and issubclass(error, DrtuneError)
    ),
    key=lambda error: error.__name__,
)


def test_tree__is_what_its_docstring_draws() -> None:
    drawn = [
        line for line in (errors.__doc__ or "").splitlines() if "Error" in line or "──" in line
    ]
    names = {line.replace("│", " ").strip(" ├└─").split()[0]: line for line in drawn}
    assert set(names) == {error.__name__ for error in ALL}
    for error in ALL:
        numbers = [word for word in names[error.__name__].split() if word.isdigit()]
        assert numbers == [str(error.exit_code)]


@pytest.mark.parametrize(
    ("error", "exit_code", "base"),
    [
        (DrtuneError, 1, Exception),
        (NoTrialCompleted, 1, DrtuneError),
        (ConfigError, 2, ValueError),
        (CheckpointError, 2, ConfigError),
        (EnvironmentProblem, 3, RuntimeError),
    ],
)
def test_error__exit_code_and_base(
    error: type[DrtuneError], exit_code: int, base: type[Exception]
) -> None:
    assert error.exit_code == exit_code
    assert issubclass(error, base)


@pytest.mark.parametrize("error", ALL)
def test_error__survives_pickling(error: type[DrtuneError]) -> None:
    original = error("batch_size=64 with 40 images: lower it")
    copy = pickle.loads(pickle.dumps(original))
    assert type(copy) is error
    assert str(copy) == "batch_size=64 with 40 images: lower it"
    assert copy.exit_code == error.exit_code
    assert copy.args == original.args


@pytest.mark.parametrize("error", [ConfigError, CheckpointError])
def test_config_error__keeps_every_problem(error: type[ConfigError]) -> None:
    problems = (f"problem {number}" for number in (1, 2))  # any iterable, read once
    original = error(problems)
    for shown in (original, pickle.loads(pickle.dumps(original))):
        assert shown.problems == ("problem 1", "problem 2")
        assert str(shown) == "problem 1\nproblem 2"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no route to host\nand more"), "no route to host"),
        (OSError("\n  no route to host \n"), "no route to host"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("  \n "), "ValueError"),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_config_error__a_single_sentence_is_one_problem() -> None:
    assert ConfigError("no such folder").problems == ("no such folder",)
