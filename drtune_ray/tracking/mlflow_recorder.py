"""Record events in MLflow: one parent run per study, one child run per trial.

Runs are looked up by tags before they are created, and metrics carry the time of their event, so
that sending an event twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drtune_ray.config.study import TrackingConfig
from drtune_ray.errors import ConfigError, EnvironmentProblem, first_line
from drtune_ray.server_uri import secrets_hidden, with_secrets
from drtune_ray.tracking.events import (
    Event,
    FilesReady,
    Metrics,
    MetricsRecorded,
    ModelReady,
    RunFinished,
    RunKey,
    RunStarted,
)
from drtune_ray.tracking.mlflow_client import (
    artifacts_folder,
    default_tracking_uri,
    quiet_mlflow,
)
from drtune_ray.tracking.model_registry import Promotion, promote, register
from drtune_ray.tracking.sqlite_store import make_database
from drtune_ray.tracking.views import VIEW_KEY, VIEW_TAG, columns_view, make_study_view

logger = logging.getLogger(__name__)
STUDY_TAG, TRIAL_TAG = "drtune.study_id", "drtune.trial"
STATE_TAG, OUTCOME_TAG = "drtune.state", "drtune.outcome"
STUDY_ITSELF = "study"
# MLflow status by Optuna state. MLflow's UI shows KILLED like FAILED, with a red cross; a pruned
# trial was stopped on purpose and is FINISHED, with a mark in its name.
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED", "INTERRUPTED": "KILLED"}
MARKED = {"PRUNED": "pruned", "FAIL": "failed", "INTERRUPTED": "interrupted"}
STOPPED_EARLY = "stopped"  # first word of the outcomes of a pruned trial that trained well
# Tags of a study that its trials have too.
INHERITED = (
    "drtune.data_digest",
    "drtune.version",
    "drtune.numeric_version",
    "mlflow.source.git.commit",
    "mlflow.source.name",
    "mlflow.user",
)
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100
DELETED = "deleted"  # MLflow's word
# MLflow's codes for what it does not take, such as events of a run that was deleted meanwhile.
INVALID = "INVALID_PARAMETER_VALUE"
GONE = (INVALID, "RESOURCE_DOES_NOT_EXIST")
MAX_PARAM_LENGTH, MAX_DIGEST_LENGTH = 6000, 36
_Row = tuple[str, float, int, int]  # a metric: name, value, time in milliseconds, step


class MlflowRecorder:
    """Writes events to an MLflow tracking store; connects on the first event.

    Args:
        uri: Tracking URI.
        experiment: Name of the experiment.
        study_id: Id of the study, a tag of its runs.
        artifacts: Artifact folder of a newly created experiment; None leaves it to the server.
        restores: Whether a deleted experiment and deleted runs of trials are restored.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        study_id: str,
        artifacts: Path | None = None,
        *,
        restores: bool = False,
    ) -> None:
        self._uri, self._experiment, self._study_id = uri, experiment, study_id
        self._artifacts, self._restores = artifacts, restores
        self._client: Any = None
        self._experiment_id = ""
        self._run_ids: dict[RunKey, str] = {}
        self._names: dict[RunKey, str] = {}
        self._of_study: Any = None  # the study's run, as trials inherit from it
        self._deleted: set[RunKey] = set()
        self._left_out: set[RunKey] = set()  # whose deletion was reported

    def record(self, event: Event) -> None:
        """Send one event; errors of the client show no password.

        A deleted run of a trial stays deleted, and its events are left out, until the trial is
        trained again; the study's run is restored.

        Raises:
            EnvironmentProblem: If the experiment was deleted.
        """
        with secrets_hidden(self._uri):
            try:
                self._record(event)
            except Exception as error:
                if getattr(error, "error_code", "") not in GONE or self._client is None:
                    raise
                self._forget()
                self._record_again(event)

    def record_metrics(self, events: Sequence[Metrics]) -> None:
        """Send metrics of any runs, those of a run together; see :meth:`record`."""
        by_run: dict[RunKey, list[Metrics]] = {}
        for event in events:
            by_run.setdefault(event.number, []).append(event)
        for number, of_run in by_run.items():
            if len(of_run) == 1 or not self._takes(number, of_run):
                for event in of_run:
                    self.record(event)

    def _takes(self, number: RunKey, events: Sequence[Metrics]) -> bool:
        """Send metrics of a run together; return False if they must be sent one by one."""
        with secrets_hidden(self._uri):
            if self._find(number) is None or number in self._deleted:
                return False
            try:
                self._log_batch(number, [row for event in events for row in _rows(event)])
            except Exception as error:
                if getattr(error, "error_code", "") not in GONE:
                    raise
                return False
            return True

    def lacks_study(self) -> bool:
        """Return whether MLflow holds no run of the study."""
        return self.run_id(None) is None

    def run_id(self, number: RunKey) -> str | None:
        """Return MLflow's id of a run of this study, or None."""
        with secrets_hidden(self._uri):
            return self._find(number)

    def promote(self, event: ModelReady) -> Promotion:
        """Make a model of this study the champion of its name if it beats the present one.

        Raises:
            EnvironmentProblem: If it is not registered.
        """
        with secrets_hidden(self._uri):
            self._connect()
            return promote(self._client, event.name, event.tags)

    def _record_again(self, event: Event) -> None:
        """Send an event that was refused; one that is refused as it is would be so for ever."""
        try:
            self._record(event)
        except Exception as error:
            if getattr(error, "error_code", "") != INVALID or isinstance(event, FilesReady):
                raise
            logger.warning(
                "tracking: MLflow refuses %s of run %s, which is left out: %s",
                event.kind,
                event.number,
                first_line(error),
            )

    def _record(self, event: Event) -> None:
        self._connect()
        self._find(event.number)
        if event.number in self._deleted:
            is_of_trial = event.number is not None and not isinstance(event, RunStarted)
            if is_of_trial and not self._restores:
                self._leave_out(event.number)
                return
            self._restore(event.number)
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, Metrics):
            self._log_batch(event.number, _rows(event))
        elif isinstance(event, RunFinished):
            self._finish(event)
        elif isinstance(event, FilesReady):
            self._copy(event)
        elif isinstance(event, ModelReady):
            register(self._client, self._experiment_id, self._existing(event.number), event)

    def _find(self, number: RunKey) -> str | None:
        self._connect()
        if number in self._run_ids:
            return self._run_ids[number]
        found = self._search(number)
        if not found:
            return None
        # An active one before a deleted one; of two, every process takes the same.
        run = min(found, key=lambda run: (_is_deleted(run), run.info.start_time, run.info.run_id))
        self._run_ids[number] = str(run.info.run_id)
        self._names[number] = str(run.info.run_name)
        if _is_deleted(run):
            self._deleted.add(number)
        return self._run_ids[number]

    def _search(self, number: RunKey) -> list[Any]:
        """Return the runs that bear the tags of a run, deleted ones included."""
        from mlflow.entities import ViewType

        name = STUDY_ITSELF if number is None else str(number)
        found: list[Any] = self._client.search_runs(
            [self._experiment_id],
            f"tags.`{STUDY_TAG}` = '{self._study_id}' and tags.`{TRIAL_TAG}` = '{name}'",
            run_view_type=ViewType.ALL,
        )
        return found

    def _remove_duplicates(self, number: RunKey) -> None:
        """Delete the second run that a server makes whose answer to the first was lost."""
        for run in self._search(number):
            if run.info.run_id != self._run_ids[number] and not _is_deleted(run):
                self._client.delete_run(run.info.run_id)
                logger.warning(
                    "tracking: run %s is a second one of %s, made by a lost answer of the server; "
                    "it is deleted",
                    run.info.run_id,
                    self._names[number],
                )

    def _leave_out(self, number: RunKey) -> None:
        """Say once that the events of a deleted run are left out."""
        if number not in self._left_out:
            self._left_out.add(number)
            logger.warning(
                "tracking: the run of trial %s was deleted in MLflow and stays deleted; bring it "
                "back with `mlflow runs restore --run-id %s` (MLFLOW_TRACKING_URI=%s)",
                number,
                self._run_ids[number],
                self._uri,
            )

    def _restore(self, number: RunKey) -> None:
        self._client.restore_run(self._run_ids[number])
        self._deleted.discard(number)
        logger.warning(
            "tracking: the run of the %s was deleted in MLflow; it is restored, since there is "
            "more to record",
            "study" if number is None else f"trial {number}",
        )

    def _forget(self) -> None:
        """Look everything up again: runs and experiments may be deleted while a study runs."""
        self._client, self._run_ids, self._deleted, self._of_study = None, {}, set(), None

    def _connect(self) -> None:
        if self._client is not None:
            return
        quiet_mlflow()
        import mlflow

        uri = with_secrets(self._uri)
        make_database(uri, self._artifacts)
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            location = self._artifacts.as_uri() if self._artifacts else None
            self._experiment_id = client.create_experiment(self._experiment, location)
            client.set_experiment_tag(
                self._experiment_id, VIEW_TAG + VIEW_KEY, json.dumps(columns_view())
            )
        elif experiment.lifecycle_stage == DELETED and self._restores:
            client.restore_experiment(experiment.experiment_id)
            self._experiment_id = experiment.experiment_id
        elif experiment.lifecycle_stage == DELETED:
            raise EnvironmentProblem(
                f"the experiment {self._experiment!r} was deleted in MLflow: bring it back with "
                f"`mlflow experiments restore -x {experiment.experiment_id}` "
                f"(MLFLOW_TRACKING_URI={self._uri}), or record this study in another one with "
                "--set tracking.experiment=NAME"
            )
        else:
            self._experiment_id = experiment.experiment_id
        self._client = client

    def _start(self, event: RunStarted) -> None:
        from mlflow.entities import Param

        run_id = self._find(event.number) or self._create(event)
        # The run may have been created by `_existing`, without params.
        self._client.update_run(run_id, status="RUNNING", name=event.name)
        self._names[event.number] = event.name
        if event.number is None:
            self._of_study = None
            make_study_view(self._client, self._experiment_id, self._study_id, event, STUDY_TAG)
        inherited = self._inherited() if event.number is not None else {}
        self._set_tags(run_id, inherited | event.tags)
        self._log_dataset(run_id, event)
        # MLflow's params are immutable: a study resumed with more trials keeps the first ones.
        recorded = self._client.get_run(run_id).data.params
        params = [
            Param(key, str(value)[:MAX_PARAM_LENGTH])
            for key, value in (event.params | event.resolved).items()
            if key not in recorded and key not in event.unused
        ]
        for at in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[at : at + PARAMS_PER_CALL])

    def _inherited(self) -> dict[str, str]:
        """Return the tags of the study that its trials have too."""
        tags = self._study_run().data.tags
        return {key: tags[key] for key in INHERITED if key in tags}

    def _study_run(self) -> Any:
        if self._of_study is None:
            self._of_study = self._client.get_run(self._existing(None))
        return self._of_study

    def _log_dataset(self, run_id: str, event: RunStarted) -> None:
        """Record the images that a run reads; a trial reads those of its study."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if event.number is not None:
            datasets = self._study_run().inputs.dataset_inputs
        elif event.dataset:
            about = event.dataset
            dataset = Dataset(
                about["name"],
                about["digest"][:MAX_DIGEST_LENGTH],
                "local",
                json.dumps({"uri": about["source"]}),
                profile=about["profile"],
            )
            datasets = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        else:
            return
        if datasets:
            self._client.log_inputs(run_id, datasets=datasets)

    def _create(self, event: RunStarted) -> str:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        name = STUDY_ITSELF if event.number is None else str(event.number)
        tags = event.tags | {STUDY_TAG: self._study_id, TRIAL_TAG: name}
        if event.number is not None:
            tags[MLFLOW_PARENT_RUN_ID] = self._existing(None)
        run = self._client.create_run(
            self._experiment_id, start_time=event.time_ms, tags=tags, run_name=event.name
        )
        self._run_ids[event.number] = str(run.info.run_id)
        self._names[event.number] = event.name
        return self._run_ids[event.number]

    def _finish(self, event: RunFinished) -> None:
        run_id = self._existing(event.number)
        self._log_batch(
            event.number, _rows(MetricsRecorded(event.number, 0, event.metrics, event.time_ms))
        )
        self._set_tags(run_id, event.tags | {STATE_TAG: event.state, OUTCOME_TAG: event.outcome})
        self._client.set_terminated(run_id, STATUS[event.state], event.time_ms)
        name = self._names[event.number]
        if event.number is not None and (marked := marked_name(name, event)) != name:
            self._client.update_run(run_id, name=marked)
            self._names[event.number] = marked
        self._remove_duplicates(event.number)

    def _set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Set all tags in one call."""
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _log_batch(self, number: RunKey, rows: Sequence[_Row]) -> None:
        from mlflow.entities import Metric

        for at in range(0, len(rows), METRICS_PER_CALL):
            part = [Metric(*row) for row in rows[at : at + METRICS_PER_CALL]]
            self._client.log_batch(self._existing(number), metrics=part)

    def _copy(self, event: FilesReady) -> None:
        path, run_id = Path(event.path), self._existing(event.number)
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), event.artifact_path)
        elif path.is_file():
            self._client.log_artifact(run_id, str(path), event.artifact_path)
        else:  # removed while the event was queued
            logger.warning("tracking: %s no longer exists, so it is not copied to MLflow", path)

    def _existing(self, number: RunKey) -> str:
        """Return the run's id, creating the run if its start was never recorded or was deleted."""
        if (run_id := self._find(number)) is not None:
            if number in self._deleted:
                self._restore(number)
            return run_id
        name = f"trial-{number:04d}" if isinstance(number, int) else number or self._study_id
        return self._create(RunStarted(number, name, {}, {}))


def _rows(event: Metrics) -> list[_Row]:
    """Return the rows of an event's metrics."""
    if isinstance(event, MetricsRecorded):
        return [(key, value, event.time_ms, event.step) for key, value in event.metrics.items()]
    return [
        (f"step_{key}", value, event.time_ms, event.first_step + at)
        for at, step in enumerate(event.steps)
        for key, value in step.items()
    ]


def _is_deleted(run: Any) -> bool:
    return bool(run.info.lifecycle_stage == DELETED)


def marked_name(name: str, event: RunFinished) -> str:
    """Return the name of a run with how it ended after the first word, if it did not complete."""
    first, _, rest = re.sub(r" \[[^]]*\]", "", name, count=1).partition(" ")
    mark = MARKED.get(event.state, "")
    if event.state == "PRUNED" and not event.outcome.startswith(STOPPED_EARLY):
        mark = event.outcome or mark  # such as "diverged"
    return " ".join(part for part in (first, f"[{mark}]" if mark else "", rest) if part)


def build_recorder(
    tracking: TrackingConfig, storage: Path, study_id: str, *, restores: bool = False
) -> MlflowRecorder:
    """Return the recorder of a study: the configured server, else SQLite in the storage."""
    uri, artifacts = tracking.uri, None
    if not uri:
        uri, artifacts = default_tracking_uri(storage), artifacts_folder(storage)
    return MlflowRecorder(uri, tracking.experiment, study_id, artifacts, restores=restores)


def ignored_variables(tracking: TrackingConfig) -> tuple[str, ...]:
    """Return a sentence for each variable of MLflow that is set and, unlike elsewhere, not used.

    The settings of a study must not depend on the shell from which it is resumed.
    """
    unused = {}
    if tracking.uri is None:
        unused["MLFLOW_TRACKING_URI"] = "tracking.uri (--tracking-uri)"
    if "experiment" not in tracking.model_fields_set:
        unused["MLFLOW_EXPERIMENT_NAME"] = "tracking.experiment"
    return tuple(
        f"{name} is set but not used: {setting} says where the runs are recorded"
        for name, setting in unused.items()
        if os.environ.get(name)
    )


def check_tracking(uri: str | None) -> None:
    """Check the form of a tracking URI.

    Raises:
        ConfigError: If it is not an address, or names an environment variable that is not set.
    """
    if uri is not None and "://" not in with_secrets(uri):
        raise ConfigError(
            f"tracking.uri={uri!r} is not valid: give http://HOST:PORT of an MLflow server, or the "
            "URL of a database"
        )
