"""What MLflow is told of a study at its start: identity, code, machine, images and weights."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
from pathlib import Path

import drtune_ray
from drtune_ray.config.study import TRAINING, StudyConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.report import image_notes
from drtune_ray.folders import LocalFolder
from drtune_ray.results.used_settings import resolved_settings, unused_settings
from drtune_ray.storage.fingerprint import NOT_DECIDING, NUMERIC_VERSION
from drtune_ray.study.inputs import StudyInputs
from drtune_ray.tracking.events import FilesReady, RunStarted
from drtune_ray.values import flattened, flattened_without

INPUTS_NAME = "inputs"
GIT_SECONDS = 5.0


def study_started(config: StudyConfig, checked: StudyInputs, searched: list[str]) -> RunStarted:
    """Return the event of a study's start.

    Settings that decide its results are params; those that a later run may change are tags.
    """
    # The trials record their own settings; study.yaml holds the base and the space.
    values = config.model_dump(mode="json", exclude={"trial", "space"})
    params = flattened_without(values, NOT_DECIDING)
    changing = {path: v for path, v in flattened(values).items() if path not in params}
    tags = {f"drtune.{path}": str(value) for path, value in changing.items() if value is not None}
    tags["mlflow.note.content"] = f"drtune-ray study in {config.folder}"
    return RunStarted(
        None,
        config.name,
        params,
        tags | code_tags() | _input_tags(checked),
        dataset=_dataset(config.trial, checked),
        searched=searched,
    )


def training_started(name: str, config: TrialConfig, checked: StudyInputs) -> RunStarted:
    """Return the event of the start of a single training."""
    tags = {"drtune.kind": TRAINING, "drtune.seed": str(config.seed)}
    return RunStarted(
        None,
        name,
        flattened(config.to_mapping()),
        tags | code_tags() | _input_tags(checked),
        dataset=_dataset(config, checked),
        unused=unused_settings(config),
        resolved=resolved_settings(config),
    )


def _input_tags(checked: StudyInputs) -> dict[str, str]:
    return {
        "drtune.data_digest": checked.splits.content_digest(),
        "drtune.weights_digest": checked.weights_digest,
    }


def _dataset(config: TrialConfig, checked: StudyInputs) -> dict[str, str]:
    return {
        "name": Path(config.data.train).name,
        "digest": checked.splits.content_digest(),
        "source": config.data.train,
        "profile": json.dumps({"summary": checked.summary()}),
    }


def inputs_written(folder: Path, checked: StudyInputs) -> FilesReady:
    """Write what the plan says of images and weights; return the event that sends it to MLflow."""
    inputs = folder / INPUTS_NAME
    facts = json.dumps(
        checked.key_report.facts() | {"normalization": checked.normalization_note}, indent=1
    )
    texts = {
        "weights.json": (facts,),
        "data.txt": (checked.summary(), *image_notes(checked.splits)),
        "weights.txt": (str(checked.key_report), checked.normalization_note, *checked.more_notes),
    }
    for name, lines in texts.items():
        LocalFolder(inputs).write(name, "".join(f"{line}\n" for line in lines).encode())
    return FilesReady(None, str(inputs), INPUTS_NAME)


def code_tags() -> dict[str, str]:
    """Return the tags of the code and machine that drive a study."""
    tags = {
        "drtune.version": drtune_ray.__version__,
        "drtune.numeric_version": str(NUMERIC_VERSION),
        "drtune.host": socket.gethostname(),
        "mlflow.source.name": "drtune-ray",
        "mlflow.source.type": "LOCAL",
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        pass
    commit = _git_commit(Path(drtune_ray.__file__))
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _git_commit(file: Path) -> str:
    """Return the commit of the checkout that a file belongs to; empty if it is in none."""
    git = shutil.which("git")
    if git is None:
        return ""

    def output(*arguments: str) -> str:
        command = [git, "-C", str(file.parent), *arguments]
        return subprocess.run(  # nosec B603 # no shell, of the input nothing
            command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS
        ).stdout.strip()

    try:
        output("ls-files", "--error-unmatch", file.name)  # not one that merely lies around it
        return output("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return ""
