"""The record of a comparison: its id, its settings, and its run in MLflow."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from drtune_ray.config.study import StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.folders import LocalFolder
from drtune_ray.results.comparison.result import PAGE_NAME, SEEDS_NAME, ComparisonResult
from drtune_ray.storage.record import SPOOL_NAME
from drtune_ray.study.comparison_plan import SUFFIX
from drtune_ray.tracking.events import FilesReady, RunFinished, RunStarted
from drtune_ray.tracking.mlflow_recorder import build_recorder
from drtune_ray.tracking.spool import Spool
from drtune_ray.tracking.writer import send_rest
from drtune_ray.values import full_path, read_yaml, to_yaml

RECORD_NAME = "comparison.yaml"
ID = "id"


class Recorded(Protocol):
    """A comparison that has a record: of one split, or of folds."""

    @property
    def config(self) -> StudyConfig:
        """The study that all methods share."""

    @property
    def methods(self) -> dict[str, str]:
        """`method.name` by the method's name in the comparison."""

    @property
    def folder(self) -> Path:
        """Folder of the comparison."""

    def to_mapping(self) -> dict[str, object]:
        """Return methods and settings as plain values."""


def recorded(comparison: Recorded) -> dict[str, object]:
    """Return what the record in the comparison's folder holds; empty if there is none to read."""
    try:
        return read_yaml(comparison.folder / RECORD_NAME)
    except (OSError, ConfigError):
        return {}


def is_recorded(comparison: Recorded) -> bool:
    """Return whether the record holds these methods and settings."""
    known = recorded(comparison)
    return {key: value for key, value in known.items() if key != ID} == comparison.to_mapping()


class ComparisonRecord:
    """The comparison's own record: its id, its settings, and its run in MLflow."""

    def __init__(self, comparison: Recorded, tags: Mapping[str, str] | None = None) -> None:
        config, self._folder = comparison.config, comparison.folder
        former = recorded(comparison).get(ID)
        self._id = str(former or f"{self._folder.name}-{uuid.uuid4().hex[:12]}")
        content = {ID: self._id} | comparison.to_mapping()
        LocalFolder(self._folder).write(RECORD_NAME, to_yaml(content).encode())
        self._spool = Spool(self._folder / SPOOL_NAME)
        self._recorder = build_recorder(config.tracking, full_path(config.storage), self._id)
        params = {f"method.{name}": method for name, method in comparison.methods.items()}
        params |= {"num_seeds": str(config.finalists.num_seeds)}
        note = f"drtune-ray comparison in {self._folder}"
        own = {"drtune.kind": "comparison", "mlflow.note.content": note}
        self._spool.append(RunStarted(None, self._folder.name, params, {**(tags or {}), **own}))
        send_rest(self._spool, self._recorder)

    def tags(self) -> dict[str, str]:
        """Return the tags that make the run of a study or of a fold a child of this one."""
        tags = {"drtune.comparison": self._id}
        try:
            parent = self._recorder.run_id(None)
        except Exception:  # a server that is away costs the comparison nothing
            parent = None
        return tags | ({"mlflow.parentRunId": parent} if parent else {})

    def end(self, state: str, metrics: dict[str, float]) -> int:
        """Record the end; return the number of events that are not sent."""
        self._spool.append(RunFinished(None, state, state.lower(), metrics, {}))
        return send_rest(self._spool, self._recorder)

    def finish(self, found: ComparisonResult) -> int:
        """Record the result; return the number of events that are not sent."""
        if not found.was_done:
            for name in (PAGE_NAME, SEEDS_NAME):
                self._spool.append(FilesReady(None, str(self._folder / name), SUFFIX))
        scores = found.compared.scores
        return self.end("COMPLETE", {f"test_accuracy.{n}": s.mean for n, s in scores.items()})
