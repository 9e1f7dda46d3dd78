"""Whether a study has come to its very end, and with which limits."""

from __future__ import annotations

import json
from pathlib import Path

from drtune_ray.config.study import StudyConfig
from drtune_ray.folders import LocalFolder
from drtune_ray.search.identity import DONE_NAME


def write_done(config: StudyConfig, num_trials: int) -> None:
    """Say that a study with these limits is done; written last.

    Args:
        config: The study.
        num_trials: Trials that came to a result.
    """
    content = json.dumps(_limits(config) | {"num_trials": num_trials}, indent=1)
    LocalFolder(config.folder).write(DONE_NAME, content.encode())


def is_done(folder: Path, config: StudyConfig, num_trials: int | None = None) -> bool:
    """Whether a run with the same limits came to its end.

    Args:
        folder: Of the study.
        config: The study.
        num_trials: Trials that have a result now; None: not known yet.
    """
    try:
        done = json.loads((folder / DONE_NAME).read_text())
    except (FileNotFoundError, ValueError):
        return False
    if not isinstance(done, dict):  # of a former version
        return False
    num_then = done.get("num_trials")
    return done == _limits(config) | {"num_trials": num_then} and num_trials in (None, num_then)


def _limits(config: StudyConfig) -> dict[str, object]:
    """What may be changed to make a study that is done go on."""
    limits = ("trials", "budget", "finalists", "final_fit")
    return {key: value for key, value in config.to_mapping().items() if key in limits}
