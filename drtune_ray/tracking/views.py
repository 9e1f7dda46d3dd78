"""Views of the runs table in MLflow's UI: the columns that matter, which MLflow hides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric
from drtune_ray.server_uri import secrets_hidden, with_secrets
from drtune_ray.tracking.events import RunStarted
from drtune_ray.tracking.mlflow_client import quiet_mlflow
from drtune_ray.tracking.sqlite_store import make_database

# A view of the runs table with the columns that matter, which MLflow hides by default.
VIEW_KEY, VIEW_TAG = "drtune", "mlflow.sharedViewState."
LAST_COLUMNS = ("tags.`drtune.state`", "tags.`drtune.outcome`")
USUAL_COLUMNS = ("method.regularization_weight", "optim.backbone_lr")
MAX_COLUMNS = 12  # a tag of an experiment holds 5,000 characters


def view_key(study_id: str) -> str:
    """Return the key of the view that shows one study."""
    return f"{VIEW_KEY}-{study_id}"


def columns_view(
    searched: Sequence[str] = (), metric: Metric = METRICS[DEFAULT_METRIC]
) -> dict[str, Any]:
    """Return a view of the runs table, as MLflow's UI shares it.

    Args:
        searched: Paths of the params to show; the usual ones if empty.
        metric: Metric that chooses among the runs.
    """
    first = (f"metrics.`{metric.best}`", "params.`method.name`")
    shown = [f"params.`{path}`" for path in searched or USUAL_COLUMNS if path != "method.name"]
    columns = [*first, *shown[:MAX_COLUMNS], *LAST_COLUMNS]
    return {"selectedColumns": columns}


def runs_page(uri: str, experiment: str, study_id: str, artifacts: Path | None = None) -> str:
    """Return the path of the MLflow UI's page that lists the runs of an experiment.

    Args:
        uri: Tracking URI.
        experiment: Name of the experiment.
        study_id: Id of the study that the page shows.
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
    own = view_key(study_id)  # a study of an earlier version has none
    key = own if f"{VIEW_TAG}{own}" in found.tags else VIEW_KEY
    view = f"workflowType=machine_learning&viewStateShareKey={key}"
    return f"/#/experiments/{found.experiment_id}/runs?{view}"


def make_study_view(
    client: Any, experiment_id: str, study_id: str, event: RunStarted, study_tag: str
) -> None:
    """Make a view of the runs table that shows the runs of one study, the best first.

    MLflow nests runs only in the order of their dates, and a view cannot unfold them.

    Args:
        client: MLflow's client.
        experiment_id: Experiment of the study.
        study_id: Id of the study.
        event: Start of the study, with what it searches and its objectives.
        study_tag: Tag of the runs with the id of their study.
    """
    objectives = event.params.get("objectives") or [DEFAULT_METRIC]
    metric = METRICS[event.params.get("training.metric") or objectives[0]]
    view = columns_view(event.searched, metric) | {
        "searchFilter": f"tags.`{study_tag}` = '{study_id}'",
        "orderByKey": f"metrics.`{metric.best}`",
        "orderByAsc": metric.direction == "minimize",
    }
    tag = f"{VIEW_TAG}{view_key(study_id)}"
    client.set_experiment_tag(experiment_id, tag, json.dumps(view))
