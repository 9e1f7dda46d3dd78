"""The names of the machine's failures, from Ray's errors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.guard import STACKS
from drtune_ray.folders import FULL_DISK

HOST_OUT_OF_MEMORY = "out of memory on the host"
DISK_FULL = "disk full"
NODE_LOST = "node lost"
PROCESS_KILLED = "process killed"
HUNG = "hung"  # for so many seconds
HUNG_STACKS = "hung.txt"
UNFIT_NODE = "a node that is not fit"
MACHINE_FAILURE = "machine failure"
PROBLEM = re.compile(rf"{EnvironmentProblem.__name__}: (.+)")
IN_CREATION = "because of an error raised in its creation task"
RAISED = re.compile(r"^[\w.]+: .+", re.MULTILINE)  # the last line of a traceback
NOT_IMPORTED = re.compile(r"^(?:ModuleNotFound|Import)Error: .+", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """A failure of the machine.

    Attributes:
        outcome: Name of the failure.
        error: One line with details.
        problem: Problem of a node that the user must fix; None for other failures.
    """

    outcome: str
    error: str
    problem: EnvironmentProblem | None = None


def failure_from(error: BaseException | None, trial_folder: Path) -> Failure:
    """Return the failure that an error stands for."""
    if hung := _hung(trial_folder):
        return hung
    if error is None:
        return Failure(MACHINE_FAILURE, "unknown error")
    if problem := _node_problem(error):
        return Failure(UNFIT_NODE, str(problem), problem)
    return Failure(outcome_of(error), described(error))


def outcome_of(error: BaseException) -> str:
    """Return the name of a failure, as Optuna, MLflow and the table of trials show it."""
    for cause in causes(error):
        text = str(cause)
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            return DISK_FULL
        if (
            isinstance(cause, MemoryError | OutOfMemoryError)
            or "running low on memory" in text
            or "can't allocate memory" in text  # torch, of a CPU
        ):
            return HOST_OUT_OF_MEMORY
        if found := re.search(r"health check has been hanging for ([\d.]+) seconds", text):
            return f"{HUNG} for {float(found[1]):.0f} s"
        if isinstance(cause, NodeDiedError) or "node has died" in text:
            return NODE_LOST
        if isinstance(cause, RayActorError) and not isinstance(cause, RayTaskError):
            return MACHINE_FAILURE if IN_CREATION in text else PROCESS_KILLED
    return MACHINE_FAILURE


def _node_problem(error: BaseException) -> EnvironmentProblem | None:
    """Return the problem that a process found on its node when it started."""
    for cause in causes(error):
        if isinstance(cause, EnvironmentProblem):
            return EnvironmentProblem(str(cause))
        if isinstance(cause, ImportError):
            return _unimportable(f"{type(cause).__name__}: {cause}")
        # Of an actor that could not be made Ray hands on the text alone.
        if isinstance(cause, RayActorError) and (found := PROBLEM.search(str(cause))):
            return EnvironmentProblem(found[1])
        if isinstance(cause, RayActorError) and (lines := NOT_IMPORTED.findall(str(cause))):
            return _unimportable(lines[-1])
    return None


def _unimportable(reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"a process of a trial cannot import what it needs ({reason}): install drtune-ray of the "
        "same version, with its dependencies, on every node, and repeat the command"
    )


def described(error: BaseException) -> str:
    """Return a failure in one line."""
    *_, root = causes(error)
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    if isinstance(root, RayError):
        if IN_CREATION in str(root) and (raised := RAISED.findall(str(root))):
            return str(raised[-1])
        # Of an actor Ray tells first that it died, then who it was, then why.
        return next((line for line in reversed(lines) if line.startswith("The actor ")), lines[0])
    return f"{type(root).__name__}: {lines[0] if lines else 'no message'}"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, each once: Ray and Ray Train wrap what a worker raised."""
    known: list[BaseException] = []
    cause: Any = error
    while isinstance(cause, BaseException) and not any(cause is each for each in known):
        known.append(cause)
        yield cause
        inner = getattr(cause, "cause", None) or _of_ray_train(cause)
        cause = inner or cause.__cause__ or cause.__context__


def _of_ray_train(error: BaseException) -> BaseException | None:
    """Return a worker's error from Ray Train's; of several, one whose name is known.

    The other workers only lost their connection to the one that failed.
    """
    failures: list[BaseException] = [*getattr(error, "worker_failures", {}).values()]
    if failures:
        return max(failures, key=_tells_more)
    for name in ("controller_failure", "health_check_failure"):
        if isinstance(found := getattr(error, name, None), BaseException):
            return found
    return None


def _tells_more(failure: BaseException) -> bool:
    return _node_problem(failure) is not None or outcome_of(failure) != MACHINE_FAILURE


def _hung(trial_folder: Path) -> Failure | None:
    for path in sorted(trial_folder.glob(STACKS.format("*"))):
        stacks = path.read_text(errors="replace")
        if found := re.match(r"Timeout \((\S+)\)!", stacks):
            seconds = sum(
                float(part) * scale
                for part, scale in zip(found[1].split(":"), (3600, 60, 1), strict=True)
            )
            outcome, kept = f"{HUNG} for {seconds:g} s", trial_folder / HUNG_STACKS
            path.replace(kept)
            return Failure(outcome, f"{outcome} in {_innermost(stacks)}; its stacks: {kept}")
    return None


def _innermost(stacks: str) -> str:
    """Return the newest frame of the training thread: the main thread, which is written last.

    Ray Train's workers train in another thread, which is recognised by this package's frames.
    """
    threads = stacks.split("\n\n")
    ours = [text for text in threads if "train_epochs" in text] or threads
    frames = re.findall(r'File "(.*)", line (\d+) in (\S+)', ours[-1])
    if not frames:
        return "an unknown place"
    path, line, function = frames[0]
    return f"{function} ({path}, line {line})"


def clear_stacks(trial_folder: Path, *, has_failed: bool) -> None:
    """Remove the stack files of a trial that has ended.

    Args:
        trial_folder: Folder of the trial.
        has_failed: Whether the trial failed; its stacks are kept, since they show why.
    """
    for path in trial_folder.glob(STACKS.format("*")):
        path.unlink(missing_ok=True)
    if not has_failed:
        (trial_folder / HUNG_STACKS).unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_as_problem(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into one message; the study can be resumed.

    Raises:
        EnvironmentProblem: Naming the folder.
    """
    try:
        yield
    except Exception as error:
        if outcome_of(error) != DISK_FULL:
            raise
        raise EnvironmentProblem(
            f"the disk that holds {folder} is full: free space there, then the same command "
            "resumes the study"
        ) from error
