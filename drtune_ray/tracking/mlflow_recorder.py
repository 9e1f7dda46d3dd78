"""Record events in MLflow: one parent run per study, one child run per trial.

Runs are looked up by tags before they are created, and metrics carry the time of their event, so
that sending an event twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from drtune_ray.config.study import TrackingConfig
from drtune_ray.errors import ConfigError, EnvironmentProblem, first_line
from drtune_ray.server_uri import secrets_hidden, with_secrets
from drtune_ray.tracking.events import (
    Event,
    FilesReady,
    MetricsRecorded,
    RunFinished,
    RunKey,
    RunStarted,
    StepsRecorded,
)
from drtune_ray.tracking.sqlite_store import ARTIFACTS_NAME, make_database

logger = logging.getLogger(__name__)
STUDY_TAG, TRIAL_TAG = "drtune.study_id", "drtune.trial"
STATE_TAG, OUTCOME_TAG = "drtune.state", "drtune.outcome"
STUDY_ITSELF = "study"
# MLflow status by Optuna state. A pruned trial was stopped on purpose, so it is not FAILED.
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED", "INTERRUPTED": "KILLED"}
# A view of the runs table with the columns that matter, which MLflow hides by default.
VIEW_KEY = "drtune"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
VIEW = {
    "selectedColumns": [
        "metrics.`best_val_accuracy`",
        "params.`method.name`",
        "params.`method.regularization_weight`",
        "params.`optim.backbone_lr`",
        "tags.`drtune.outcome`",
    ]
}
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100
DELETED = "deleted"  # MLflow's word
# MLflow's codes for what it does not take, such as events of a run that was deleted meanwhile.
INVALID = "INVALID_PARAMETER_VALUE"
GONE = (INVALID, "RESOURCE_DOES_NOT_EXIST")
MAX_PARAM_LENGTH = 6000
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # Keeps MLflow from printing the server's address, with its password, at the end of each run.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # An outage must not block the writer for minutes; the writer retries by itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

MEANS_SOMETHING_IN_A_URI = frozenset("?%$")


def quiet_mlflow() -> None:
    """Disable telemetry and shorten retries; call it before importing mlflow."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # A run id in the environment would replace the parent of every run.
    os.environ.pop("MLFLOW_RUN_ID", None)


def default_tracking_uri(storage: Path) -> str:
    """Return the URI of the SQLite database in the storage."""
    path = str(storage / "mlflow.db")
    if not MEANS_SOMETHING_IN_A_URI & set(path):
        return f"sqlite:///{path}"
    from sqlalchemy import URL

    # With a driver's name: for `sqlite:` MLflow creates the folder that the quoted path names.
    uri = URL.create("sqlite+pysqlite", database=path).render_as_string()
    return uri.replace("$", "%24")  # `with_secrets` would take it for a variable


class MlflowRecorder:
    """Writes events to an MLflow tracking store; connects on the first event.

    Args:
        uri: Tracking URI.
        experiment: Name of the experiment.
        study_id: Id of the study, a tag of its runs.
        artifacts: Artifact folder of a newly created experiment; None leaves it to the server.
    """

    def __init__(
        self, uri: str, experiment: str, study_id: str, artifacts: Path | None = None
    ) -> None:
        self._uri, self._experiment, self._study_id = uri, experiment, study_id
        self._artifacts = artifacts
        self._client: Any = None
        self._experiment_id = ""
        self._run_ids: dict[RunKey, str] = {}
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

    def lacks_study(self) -> bool:
        """Return whether MLflow holds no run of the study."""
        return self.run_id(None) is None

    def run_id(self, number: RunKey) -> str | None:
        """Return MLflow's id of a run of this study, or None."""
        with secrets_hidden(self._uri):
            return self._find(number)

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
            if event.number is not None and not isinstance(event, RunStarted):
                self._leave_out(event.number)
                return
            self._restore(event.number)
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, MetricsRecorded):
            self._log_metrics(event.number, event.metrics, event.step, event.time_ms)
        elif isinstance(event, StepsRecorded):
            self._log_steps(event)
        elif isinstance(event, RunFinished):
            self._finish(event)
        elif isinstance(event, FilesReady):
            self._copy(event)

    def _find(self, number: RunKey) -> str | None:
        self._connect()
        if number in self._run_ids:
            return self._run_ids[number]
        from mlflow.entities import ViewType

        name = STUDY_ITSELF if number is None else str(number)
        found = self._client.search_runs(
            [self._experiment_id],
            f"tags.`{STUDY_TAG}` = '{self._study_id}' and tags.`{TRIAL_TAG}` = '{name}'",
            run_view_type=ViewType.ALL,
        )
        if not found:
            return None
        run = min(found, key=_is_deleted)  # an active one before a deleted one
        self._run_ids[number] = str(run.info.run_id)
        if _is_deleted(run):
            self._deleted.add(number)
        return self._run_ids[number]

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
        self._client, self._run_ids, self._deleted = None, {}, set()

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
            client.set_experiment_tag(self._experiment_id, VIEW_TAG, json.dumps(VIEW))
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
        self._set_tags(run_id, event.tags)
        # MLflow's params are immutable: a study resumed with more trials keeps the first ones.
        recorded = self._client.get_run(run_id).data.params
        params = [
            Param(key, str(value)[:MAX_PARAM_LENGTH])
            for key, value in event.params.items()
            if key not in recorded
        ]
        for at in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[at : at + PARAMS_PER_CALL])

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
        return self._run_ids[event.number]

    def _finish(self, event: RunFinished) -> None:
        run_id = self._existing(event.number)
        self._log_metrics(event.number, event.metrics, 0, event.time_ms)
        self._set_tags(run_id, event.tags | {STATE_TAG: event.state, OUTCOME_TAG: event.outcome})
        self._client.set_terminated(run_id, STATUS[event.state], event.time_ms)

    def _set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Set all tags in one call."""
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _log_metrics(
        self, number: RunKey, metrics: dict[str, float], step: int, time_ms: int
    ) -> None:
        self._log_batch(number, [(key, value, time_ms, step) for key, value in metrics.items()])

    def _log_steps(self, event: StepsRecorded) -> None:
        rows = [
            (f"step_{key}", value, event.time_ms, event.first_step + at)
            for at, step in enumerate(event.steps)
            for key, value in step.items()
        ]
        self._log_batch(event.number, rows)

    def _log_batch(self, number: RunKey, rows: list[tuple[str, float, int, int]]) -> None:
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


def _is_deleted(run: Any) -> bool:
    return bool(run.info.lifecycle_stage == DELETED)


def runs_page(uri: str, experiment: str, artifacts: Path | None = None) -> str:
    """Return the path of the MLflow UI's page that lists the runs of an experiment.

    Args:
        uri: Tracking URI.
        experiment: Name of the experiment.
        artifacts: See `make_database`.
    """
    quiet_mlflow()
    import mlflow

    with secrets_hidden(uri):
        address = with_secrets(uri)
        make_database(address, artifacts)
        found = mlflow.MlflowClient(address).get_experiment_by_name(experiment)
    if found is None:
        return "/"
    view = f"workflowType=machine_learning&viewStateShareKey={VIEW_KEY}"
    return f"/#/experiments/{found.experiment_id}/runs?{view}"


def artifacts_folder(storage: Path) -> Path:
    """Return the folder of the artifacts of the storage's own database."""
    return storage / ARTIFACTS_NAME


def build_recorder(tracking: TrackingConfig, storage: Path, study_id: str) -> MlflowRecorder:
    """Return the recorder of a study: the configured server, else SQLite in the storage."""
    if tracking.uri:
        return MlflowRecorder(tracking.uri, tracking.experiment, study_id)
    return MlflowRecorder(
        default_tracking_uri(storage), tracking.experiment, study_id, artifacts_folder(storage)
    )


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
