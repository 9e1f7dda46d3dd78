"""User-facing errors: one small tree, each with the exit code of the command line.

DrtuneError                       1
├── NoTrialCompleted              1   the study ran and no trial completed
├── ConfigError (ValueError)      2   bad input or configuration
│   └── CheckpointError           2   a corrupt or foreign checkpoint file
└── EnvironmentProblem            3   unreachable server, not enough resources
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class DrtuneError(Exception):
    """An error whose message is meant for the user, shown without a traceback."""

    exit_code = 1


class NoTrialCompleted(DrtuneError):
    """The study ran and no trial completed."""


class ConfigError(DrtuneError, ValueError):
    """Bad input or configuration, with every problem that was found and its fix.

    Args:
        problems: One sentence per problem, or a single sentence.
    """

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


class CheckpointError(ConfigError):
    """A checkpoint that is corrupt, of another format, or of another trial."""


class EnvironmentProblem(DrtuneError, RuntimeError):
    """The machine, cluster or server cannot do what the command needs."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
