"""A study as it is sent to a cluster: checked here as far as it can be without the cluster.

What reads the images, the weights or the machine belongs to the job: defaults that fit the machine
are chosen there, and a folder that is not there is the job's to refuse.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from drtune_ray.config.sources import merged_study
from drtune_ray.config.study import StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.execution.environment import SUBMITTED_WITH
from drtune_ray.jobs.address import is_loopback
from drtune_ray.jobs.attempts import NUMBER_KEY, SETTINGS_KEY, STORAGE_KEY, STUDY_KEY
from drtune_ray.jobs.env_vars import Variables, needed_variables
from drtune_ray.space.search_space import SearchSpace, read_space, start_points
from drtune_ray.values import digest, to_yaml

STUDY_FILE = "study.yaml"
WEIGHTS_WITHOUT_FILE = ("timm", "demo")


@dataclass(frozen=True)
class Submission:
    """What a cluster needs to run a study.

    Attributes:
        study: Its name.
        storage: Where it lies, on the cluster.
        content: Of the study file: what was asked for, as YAML.
        variables: For the job's environment.
        notes: Sentences about what the job will meet.
    """

    study: str
    storage: str
    content: str
    variables: Variables
    notes: tuple[str, ...]

    @property
    def settings(self) -> str:
        """Hash of what the job is to do."""
        return digest(self.content, sorted(self.variables.sent))

    def submission_id(self, number: int) -> str:
        """Ray's name for an attempt: the same study, wherever it is submitted from."""
        return f"drtune-{self.study}-{digest(self.storage)[:8]}-{number}"

    def metadata(self, number: int, arguments: Iterable[str]) -> dict[str, str]:
        """What the job server remembers of an attempt, all texts.

        Args:
            number: Of the attempt.
            arguments: Of the command that submits it.
        """
        return {
            STUDY_KEY: self.study,
            STORAGE_KEY: self.storage,
            NUMBER_KEY: str(number),
            SETTINGS_KEY: self.settings,
            SUBMITTED_WITH: json.dumps(list(arguments)),
        }


def study_submission(
    study_file: Path | None, assignments: Iterable[str], flags: Mapping[str, Any]
) -> Submission:
    """What a command asks for, to be sent.

    Args:
        study_file: YAML of a `StudyConfig`; None where flags say it all.
        assignments: ``path=value``, as of `tune`.
        flags: As of `tune`.

    Raises:
        ConfigError: Naming every problem that can be seen without the cluster.
    """
    asked = merged_study(study_file, assignments, flags)
    config = StudyConfig.from_mapping(asked)
    problems = list(_relative_paths(config))
    space = read_space(config.space) if isinstance(config.space, str) else config.space
    try:
        start_points(SearchSpace.from_mapping(space, config.trial), config.start_with)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    storage = posixpath.normpath(config.storage)
    # Files that are named here need not be there; plain values do not know their lines.
    plain = json.loads(json.dumps(asked | {"space": space, "storage": storage}))
    variables = needed_variables(config, os.environ)
    return Submission(config.name, storage, to_yaml(plain), variables, _notes(config, variables))


def _relative_paths(config: StudyConfig) -> Iterator[str]:
    """A sentence for each path that means nothing on another machine."""
    if not _is_absolute(config.storage):
        yield (
            f"storage={config.storage!r} would lie in the job's own folder, which is removed after "
            "it: give --storage by its full path, a folder that the cluster's nodes share"
        )
    if not _is_absolute(config.trial.data.train):
        yield (
            f"data.train={config.trial.data.train!r} is read on the cluster: give its full path "
            "there"
        )
    weights = config.trial.backbone.weights
    if weights not in WEIGHTS_WITHOUT_FILE and not _is_absolute(weights):
        yield f"backbone.weights={weights!r} is read on the cluster: give its full path there"
    for path, uri in _servers(config).items():
        parts = urlsplit(uri)
        if parts.scheme.startswith("sqlite") and not parts.path.startswith("//"):
            yield f"{path}={uri!r} is opened on the cluster: give the file's full path there"


def _servers(config: StudyConfig) -> dict[str, str]:
    given = {"optuna_storage": config.optuna_storage, "tracking.uri": config.tracking.uri}
    return {path: uri for path, uri in given.items() if uri}


def _is_absolute(path: str) -> bool:
    return path.startswith(("/", "~"))


def _notes(config: StudyConfig, variables: Variables) -> tuple[str, ...]:
    notes = []
    for path, uri in _servers(config).items():
        host = urlsplit(uri).hostname
        if host and is_loopback(host):
            notes.append(f"{path} names {host}: for the job that is the machine on which it runs")
    if variables.unset:
        notes.append(f"Not set here, so the cluster must have them: {', '.join(variables.unset)}")
    return tuple(notes)


@dataclass(frozen=True)
class EntrypointResources:
    """What a job's command itself reserves; with nothing it runs on the head node.

    Attributes:
        num_cpus: CPUs.
        num_gpus: GPUs.
        memory: Bytes.
        custom: Resources that the cluster declares.
    """

    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    custom: Mapping[str, float] = field(default_factory=dict)


def custom_resources(text: str | None) -> dict[str, float]:
    """Resources as Ray's command line takes them, like ``{"trial_driver": 1}``.

    Raises:
        ConfigError: If they are no such object.
    """
    try:
        amounts = json.loads(text or "{}")
    except ValueError:
        amounts = None
    are_amounts = isinstance(amounts, dict) and all(
        type(amount) in (int, float) and amount > 0 for amount in amounts.values()
    )
    if not are_amounts:
        raise ConfigError(
            f"--entrypoint-resources {text!r} must be names and amounts as JSON, like "
            "'{\"trial_driver\": 1}'"
        )
    return {name: float(amount) for name, amount in amounts.items()}
