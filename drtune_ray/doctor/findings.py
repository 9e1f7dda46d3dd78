"""Checks one after another: each has its line, whatever became of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from drtune_ray.errors import DrtuneError, EnvironmentProblem, first_line


class State(StrEnum):
    """What became of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


LOST = (State.FAILED, State.SKIPPED)


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    Attributes:
        check: Its name.
        state: What became of it.
        text: What was seen; where something is wrong, what to do about it too.
    """

    check: str
    state: State
    text: str


class Doubt(Exception):
    """Something that works and that the user should know of; the check has a warning."""


class Examination:
    """Runs checks and tells each finding as it comes.

    Args:
        tell: Takes the findings.
    """

    def __init__(self, tell: Callable[[Finding], None]) -> None:
        self._tell = tell
        self._states: dict[str, State] = {}

    def check(self, name: str, look: Callable[[], str], needs: Sequence[str] = ()) -> bool:
        """Run a check; whether what depends on it can be looked at.

        Args:
            name: Its name.
            look: Returns what was seen. What it raises is the finding: a `Doubt` a warning,
                everything else a failure.
            needs: Names of the checks without which this one means nothing.
        """
        lost = [other for other in needs if self._states[other] in LOST]
        if lost:
            became = "failed" if self._states[lost[0]] == State.FAILED else "was skipped"
            finding = Finding(name, State.SKIPPED, f"needs {lost[0]!r}, which {became}")
        else:
            finding = _finding(name, look)
        self._states[name] = finding.state
        self._tell(finding)
        return finding.state not in LOST

    def raise_if_failed(self) -> None:
        """Sum up.

        Raises:
            EnvironmentProblem: If a check failed, naming those.
        """
        failed = [name for name, state in self._states.items() if state == State.FAILED]
        if failed:
            raise EnvironmentProblem(
                f"{len(failed)} of {len(self._states)} checks failed: {', '.join(failed)}"
            )


def _finding(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, State.OK, look())
    except Doubt as doubt:
        return Finding(name, State.WARNING, str(doubt))
    except DrtuneError as error:
        lines = (line.strip() for line in str(error).splitlines())
        return Finding(name, State.FAILED, "; ".join(filter(None, lines)).replace(":;", ":"))
    except Exception as error:  # the other checks must not be lost by it
        return Finding(name, State.FAILED, f"{type(error).__name__}: {first_line(error)}")
