"""Models in MLflow: logged with the study's run, registered under its name, promoted, fetched."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from drtune_ray import __version__
from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric
from drtune_ray.errors import ConfigError, EnvironmentProblem, first_line
from drtune_ray.server_uri import secrets_hidden, with_secrets
from drtune_ray.tracking.events import ModelReady
from drtune_ray.tracking.mlflow_client import quiet_mlflow
from drtune_ray.tracking.sqlite_store import make_database, sqlite_file

CHAMPION = "champion"
SCHEME = "models:/"
# Tags of a version.
WEIGHTS_TAG, ACCURACY_TAG = "drtune.weights_sha256", "drtune.val_accuracy"
VALIDATION_TAG = "drtune.validation_images"
# Of a model that another metric than accuracy chose.
METRIC_TAG, VALUE_TAG = "drtune.metric", "drtune.value"
NOT_THERE = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # MLflow's codes
FOLDER = "winner"  # the package among the artifacts of a logged model
NEEDED = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "timm", "torch")


@dataclass(frozen=True)
class Promotion:
    """Whether a model became the champion of its name.

    Attributes:
        uri: URI of the alias.
        version: Version of the model.
        is_champion: Whether the alias names this version now.
        reason: Why, as a sentence without a capital.
    """

    uri: str
    version: str
    is_champion: bool
    reason: str


def register(client: Any, experiment_id: str, run_id: str, event: ModelReady) -> None:
    """Log a model with a run and register it; what is there already is not made again.

    Args:
        client: MLflow's client.
        experiment_id: Experiment of the run.
        run_id: Run of the study.
        event: The model.
    """
    if not Path(event.path).is_dir():  # removed while the event was queued; a new one follows
        return
    model = _logged(client, experiment_id, run_id, event)
    if find_version(client, event.name, event.tags) is None:
        _make_name(client, event.name)
        # A database's store would look an id up in the process's own tracking URI.
        is_server = client.tracking_uri.startswith(("http://", "https://"))
        source = f"{SCHEME}{model.model_id}" if is_server else model.artifact_location
        client.create_model_version(
            event.name,
            source,
            run_id=run_id,
            tags=event.tags,
            model_id=model.model_id,
        )


def find_version(client: Any, name: str, tags: dict[str, str]) -> Any:
    """Return the version of a registered model that has the same weights; None if none has."""
    found = client.search_model_versions(f"name = '{name}'")
    same = [one for one in found if one.tags.get(WEIGHTS_TAG) == tags[WEIGHTS_TAG]]
    return min(same, key=lambda one: int(one.version), default=None)


def promote(client: Any, name: str, tags: dict[str, str]) -> Promotion:
    """Make a model the champion of its name if it beats the present one on the same images.

    Args:
        client: MLflow's client.
        name: Name of the registered model.
        tags: Tags of the model.

    Raises:
        EnvironmentProblem: If the model is not registered.
    """
    own = find_version(client, name, tags)
    if own is None:
        raise EnvironmentProblem(
            f"{name} has no version with these weights in MLflow, where it was deleted: bring it "
            "back with `drtune-ray sync --all`"
        )
    present = _champion(client, name)
    is_better, reason = _comparison(own, present)
    if is_better:
        client.set_registered_model_alias(name, CHAMPION, own.version)
    is_champion = is_better or (present is not None and str(present.version) == str(own.version))
    return Promotion(f"{SCHEME}{name}@{CHAMPION}", str(own.version), is_champion, reason)


def _comparison(own: Any, present: Any) -> tuple[bool, str]:
    """Return whether a version beats the champion, and why or why not."""
    if present is None:
        return True, "there was no champion"
    if str(present.version) == str(own.version):
        return False, "it is the champion already"
    metric, value = _measured(own.tags)
    if value is None:
        return False, (
            f"version {own.version} has no validation accuracy: its final fit trained on the "
            "validation images"
        )
    other, former = _measured(present.tags)
    if former is None or present.tags.get(VALIDATION_TAG) != own.tags.get(VALIDATION_TAG):
        return False, (
            f"version {present.version} was not measured on the same validation images, so that "
            "the accuracies cannot be compared"
        )
    if metric != other:
        return False, (
            f"version {present.version} was chosen by {other.label} and version {own.version} by "
            f"{metric.label}, so that they cannot be compared"
        )
    is_better = metric.score(value) > metric.score(former)
    if metric != METRICS[DEFAULT_METRIC]:
        return is_better, (
            f"version {own.version} has {value:.4f} and version {present.version} {former:.4f}: "
            f"{metric.label}"
        )
    return is_better, (
        f"version {own.version} is correct on {value:.2%} of the validation images, "
        f"version {present.version} on {former:.2%}"
    )


def _measured(tags: Mapping[str, str]) -> tuple[Metric, float | None]:
    """Return the metric that chose a version, and its value; None after a final fit."""
    metric = METRICS[tags.get(METRIC_TAG, DEFAULT_METRIC)]
    value = tags.get(VALUE_TAG if METRIC_TAG in tags else ACCURACY_TAG)
    return metric, None if value is None else float(value)


def _champion(client: Any, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return None
        raise


def _make_name(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _logged(client: Any, experiment_id: str, run_id: str, event: ModelReady) -> Any:
    """Return the logged model of a run with these weights, made if it is missing or incomplete."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    known = client.search_logged_models(
        [experiment_id],
        filter_string=f"tags.`{WEIGHTS_TAG}` = '{event.tags[WEIGHTS_TAG]}' "
        f"AND source_run_id = '{run_id}'",
    )
    for model in known:
        if model.status == LoggedModelStatus.READY:
            return model
    model = known[0] if known else _created(client, experiment_id, run_id, event)
    with tempfile.TemporaryDirectory(prefix="drtune-ray-") as folder:
        path = Path(folder, "model")
        _write(path, event, model, run_id)
        client.log_model_artifacts(model.model_id, str(path))
    outputs = client.get_run(run_id).outputs.model_outputs
    if model.model_id not in {output.model_id for output in outputs}:  # else an error
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _created(client: Any, experiment_id: str, run_id: str, event: ModelReady) -> Any:
    return client.create_logged_model(
        experiment_id,
        re.sub(r"[^\w-]", "-", event.name),
        run_id,
        tags=event.tags,
        params={"drtune_ray": __version__},
        model_type="image-classifier",
    )


def _write(path: Path, event: ModelReady, model: Any, run_id: str) -> None:
    """Write a model in MLflow's format: code, signature, requirements, and the package."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Map

    any_type: Any = AnyType  # untyped in MLflow
    # `image` has any type: text in base64, bytes, or pixels.
    inputs = Schema([ColSpec(any_type(), "image")])
    outputs = Schema(
        [
            ColSpec(DataType.string, "label"),
            ColSpec(DataType.double, "probability"),
            ColSpec(Map(DataType.double), "probabilities"),
        ]
    )
    needed = [f"drtune-ray=={__version__}", *(f"{name}=={version(name)}" for name in NEEDED)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*An input example was not provided")
        save_model(
            path,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={FOLDER: Path(event.path).as_uri()},
            signature=ModelSignature(inputs, outputs),
            pip_requirements=needed,
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                run_id=run_id,
                model_id=model.model_id,
            ),
        )


@contextmanager
def fetched(uri: str, tracking_uri: str, artifacts: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder with the package of a registered model.

    Args:
        uri: Such as ``models:/flowers@champion`` or ``models:/flowers/3``.
        tracking_uri: MLflow's tracking URI.
        artifacts: See `make_database`.

    Raises:
        ConfigError: If there is no such model.
        EnvironmentProblem: If MLflow cannot be reached.
    """
    quiet_mlflow()
    import mlflow
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="drtune-ray-") as folder, secrets_hidden(tracking_uri):
        address = with_secrets(tracking_uri)
        file = sqlite_file(address)
        if file is not None and not file.is_file():
            raise ConfigError(
                f"{uri} is looked for in {file}, which does not exist: give the --storage of the "
                "study, or the --tracking-uri of its MLflow server"
            )
        make_database(address, artifacts)
        try:
            place = _place(mlflow.MlflowClient(address), uri)
            path = mlflow.artifacts.download_artifacts(place, dst_path=folder, tracking_uri=address)
        except MlflowException as error:
            if error.error_code in NOT_THERE:
                raise ConfigError(
                    f"{uri} is not in MLflow at {tracking_uri} ({first_line(error)}): give "
                    f"{SCHEME}NAME@{CHAMPION} or {SCHEME}NAME/VERSION"
                ) from None
            raise _unreachable(tracking_uri, error) from None
        except OSError as error:
            raise _unreachable(tracking_uri, error) from None
        package = Path(path, "artifacts", FOLDER)
        if not package.is_dir():
            raise ConfigError(f"{uri} was not logged by drtune-ray: give a model that was")
        yield package


def _place(client: Any, uri: str) -> str:
    """Return where the artifacts of a registered model lie."""
    name, _, alias = uri.removeprefix(SCHEME).partition("@")
    if alias:
        number = client.get_model_version_by_alias(name, alias).version
    else:
        name, _, number = name.rpartition("/")
    return str(client.get_model_version_download_uri(name, str(number)))


def _unreachable(tracking_uri: str, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the model cannot be fetched from MLflow at {tracking_uri} ({first_line(error)}): repeat "
        "the command once it can be reached"
    )
