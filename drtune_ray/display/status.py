"""The status of a study as text, as printed by `drtune-ray status`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from drtune_ray.display.text import Command, by, duration, figure, percent, short, size
from drtune_ray.results.trials import TrialSummary
from drtune_ray.study.status import (
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_SEEN,
    RUNNING,
    Status,
    best_settings,
)

LABEL_WIDTH, NAME_WIDTH = 18, 14


def status_lines(status: Status, program: str, now: float | None = None) -> Iterator[str]:
    """Yield the lines of a status.

    Args:
        status: The status.
        program: Command line name of this program.
        now: Seconds since 1970; None means the present time.
    """
    now = time.time() if now is None else now
    yield f"{status.kind.capitalize()} {status.folder.name!r}: {status.folder}"
    yield _field("state", _state(status, now))
    yield from _trials(status) if status.kind == "study" else _training(status)
    if status.evaluation is not None:
        low, high = status.evaluation.test.interval
        interval = f"95 % interval {percent(low)} to {percent(high)}"
        yield _field("test accuracy", f"{percent(status.evaluation.test.share)} ({interval})")
    if status.num_unsent:
        sent = f"{status.num_unsent} events not sent yet"
        later = "" if status.state == RUNNING else f"; send them: {program} sync {status.folder}"
        yield Command(_field("MLflow", sent + later))
    yield _field("disk", size(status.num_bytes))
    for note in status.notes:
        yield _field("warning", note)
    yield from _ways_on(status, program)


def overview_lines(found: Sequence[Status], now: float | None = None) -> Iterator[str]:
    """Yield a line for each study or training.

    Args:
        found: Their statuses.
        now: Seconds since 1970; None means the present time.
    """
    now = time.time() if now is None else now
    width = max(len(status.folder.name) for status in found)
    for status in found:
        name = f"{status.folder.name:<{width}}"
        done = f"{status.num_done} of {status.num_trials} done"
        best = figure(status.best.metric, status.best.best_value) if status.best else "-"
        yield f"{name}  {status.kind:<8}  {done:>15}  best {best:>8}  {_state(status, now)}"


def _state(status: Status, now: float) -> str:
    driver = status.driver or "an unknown process"
    ago = f"last activity {duration(now - status.last_sign)} ago"
    if status.state == RUNNING:
        return f"running: {driver}; {ago}"
    if status.state == NOT_SEEN:
        return f"running in {driver}, or killed: this host cannot tell; {ago}"
    if status.state == DONE:
        return "done"
    if status.state == FAILED:
        return "ended without a result"
    return f"interrupted; {ago}"


def _trials(status: Status) -> Iterator[str]:
    ways = ", ".join(f"{number} {outcome}" for outcome, number in status.outcomes.items())
    done = f"{status.num_done} of {status.num_trials} done"
    yield _field("trials", f"{done}: {ways}" if ways else done)
    if best := status.best:
        unfinished = ", unfinished" if best in status.unfinished else ""
        value = f"{figure(best.metric, best.best_value)}{by(best.metric)}"
        text = f"{value}, trial {best.label}{unfinished}"
        yield _field("best so far" if status.state != DONE else "best", text)
        for path, value in best_settings(status).items():
            yield _field("", f"{path} = {short(value)}")
    heading = "reference trials"
    for trial in status.references:
        yield _field(heading, f"{_figures(trial, status)}  {trial.outcome or _now(status)}")
        heading = ""
    heading = "finals"
    for trial in status.finals:
        yield _field(heading, f"{_figures(trial, status)}  {trial.outcome or _now(status)}")
        heading = ""
    heading = "running" if status.state in (RUNNING, NOT_SEEN) else "unfinished"
    for trial in status.unfinished:
        if trial in status.finals:
            continue
        yield _field(heading, _figures(trial, status))
        heading = ""


def _training(status: Status) -> Iterator[str]:
    (trial,) = status.trials
    outcome = f", {trial.outcome}" if trial.outcome else ""
    yield _field("epochs", f"{trial.num_epochs} of {status.num_epochs}{outcome}")
    if trial.best_value is not None:
        yield _field("best", f"{figure(trial.metric, trial.best_value)}{by(trial.metric)}")


def _figures(trial: TrialSummary, status: Status) -> str:
    epochs = f"epoch {trial.num_epochs}/{status.num_epochs}"
    return f"{trial.label:<{NAME_WIDTH}} {figure(trial.metric, trial.best_value):>9}  {epochs}"


def _now(status: Status) -> str:
    return "running" if status.state in (RUNNING, NOT_SEEN) else "unfinished"


def _ways_on(status: Status, program: str) -> Iterator[str]:
    if status.state == DONE and status.evaluation is None:
        yield Command(_field("test the winner", f"{program} evaluate {status.folder}"))
    elif status.state == RUNNING:
        yield Command(_field("resume if stopped", _command(status)))
    elif status.state in (INTERRUPTED, NOT_SEEN):
        yield Command(_field("resume with", _command(status)))


def _command(status: Status) -> str:
    if status.command is not None:
        return status.command
    return "repeat the command that started it; its settings are in study.yaml, under config"


def _field(name: str, text: str) -> str:
    return f"  {name:<{LABEL_WIDTH}}{text}".rstrip()
