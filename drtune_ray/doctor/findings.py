"""Run checks one after another; each has its finding, whatever the outcome of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from drtune_ray.errors import DrtuneError, EnvironmentProblem, first_line


class State(StrEnum):
    """Outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


LOST = (State.FAILED, State.SKIPPED)


@dataclass(frozen=True)
class Finding:
    """The finding of a check.

    Attributes:
        check: Name of the check.
        state: Outcome of the check.
        text: What was found, and the fix if something is wrong.
    """

    check: str
    state: State
    text: str


class Doubt(Exception):
    """Raised by a check that passes with a warning."""


class Examination:
    """Runs checks and reports each finding at once.

    Args:
        report: Receives the findings.
    """

    def __init__(self, report: Callable[[Finding], None]) -> None:
        self._report = report
        self._states: dict[str, State] = {}

    def check(self, name: str, look: Callable[[], str], needs: Sequence[str] = ()) -> bool:
        """Run a check; return whether the checks that depend on it can run.

        Args:
            name: Name of the check.
            look: Returns what was found. An exception is a finding too: a `Doubt` is a warning,
                any other a failure.
            needs: Names of the checks that must have passed; otherwise this one is skipped.
        """
        lost = [other for other in needs if self._states[other] in LOST]
        if lost:
            became = "failed" if self._states[lost[0]] == State.FAILED else "was skipped"
            finding = Finding(name, State.SKIPPED, f"needs {lost[0]!r}, which {became}")
        else:
            finding = _finding(name, look)
        self._states[name] = finding.state
        self._report(finding)
        return finding.state not in LOST

    def raise_if_failed(self) -> None:
        """Raise if any check failed.

        Raises:
            EnvironmentProblem: If a check failed, naming each that did.
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
    except Exception as error:  # must not end the other checks
        return Finding(name, State.FAILED, f"{type(error).__name__}: {first_line(error)}")
