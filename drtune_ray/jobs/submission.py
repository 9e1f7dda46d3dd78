"""A study as it is submitted to a cluster, checked as far as possible without the cluster.

Whatever depends on the images, the weights or the machine is left to the job: it chooses defaults
that fit its machine, and it reports a missing folder.
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
from drtune_ray.folders import is_object_uri
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
        study: Name of the study.
        storage: Storage of the study on the cluster.
        content: Content of the study file, YAML of the settings that were given.
        variables: Environment variables of the job.
        notes: Sentences for the user about the job's environment.
    """

    study: str
    storage: str
    content: str
    variables: Variables
    notes: tuple[str, ...]

    @property
    def settings(self) -> str:
        """Hash of the submitted settings."""
        return digest(self.content, sorted(self.variables.sent))

    def submission_id(self, number: int) -> str:
        """Return Ray's id of an attempt, which does not depend on the submitting machine."""
        return f"drtune-{self.study}-{digest(self.storage)[:8]}-{number}"

    def metadata(self, number: int, arguments: Iterable[str]) -> dict[str, str]:
        """Return the metadata of an attempt on the job server.

        Args:
            number: Number of the attempt.
            arguments: Arguments of the command that submits it.
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
    """Build a submission from the arguments of a command.

    Args:
        study_file: YAML of a `StudyConfig`; None if flags give all settings.
        assignments: ``path=value`` settings, as for `tune`.
        flags: Flags, as for `tune`.

    Raises:
        ConfigError: If a setting is not valid; every problem that can be found without the
            cluster is named.
    """
    given = merged_study(study_file, assignments, flags)
    config = StudyConfig.from_mapping(given)
    problems = list(_relative_paths(config))
    space = read_space(config.space) if isinstance(config.space, str) else config.space
    try:
        start_points(SearchSpace.from_mapping(space, config.trial), config.start_with)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    storage = posixpath.normpath(config.storage)
    # The space is included because its file need not exist there; JSON drops the line numbers.
    plain = json.loads(json.dumps(given | {"space": space, "storage": storage}))
    variables = needed_variables(config, os.environ)
    return Submission(config.name, storage, to_yaml(plain), variables, _notes(config, variables))


def _relative_paths(config: StudyConfig) -> Iterator[str]:
    """Yield a message for each path that is not valid on another machine."""
    if not _is_absolute(config.storage):
        yield (
            f"storage={config.storage!r} would be in the job's own folder, which is removed when "
            "the job ends: give --storage as the full path of a folder that all nodes share"
        )
    images = config.trial.data.train
    if not (_is_absolute(images) or is_object_uri(images)):
        yield (f"data.train={images!r} is read on the cluster: give its full path there")
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
            notes.append(f"{path} names {host}, which for the job is the machine that it runs on")
    if variables.unset:
        notes.append(
            f"Not set here, so they must be set on the cluster: {', '.join(variables.unset)}"
        )
    return tuple(notes)


@dataclass(frozen=True)
class EntrypointResources:
    """Resources that a job's command reserves; without any it runs on the head node.

    Attributes:
        num_cpus: Number of CPUs.
        num_gpus: Number of GPUs.
        memory: Memory in bytes.
        custom: Amounts of resources that the cluster declares, by name.
    """

    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    custom: Mapping[str, float] = field(default_factory=dict)


def custom_resources(text: str | None) -> dict[str, float]:
    """Parse resources in the form of Ray's command line, such as ``{"trial_driver": 1}``.

    Raises:
        ConfigError: If the text has another form.
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
            f"--entrypoint-resources {text!r} must be a JSON object of names and positive amounts, "
            "like '{\"trial_driver\": 1}'"
        )
    return {name: float(amount) for name, amount in amounts.items()}
