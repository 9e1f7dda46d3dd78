"""The environment variables that are sent to the cluster with a study: only those listed here.

Anyone with access to the job server can read them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from drtune_ray.config.study import StudyConfig
from drtune_ray.folders import is_object_uri
from drtune_ray.server_uri import names_in

# Login of the server in tracking.uri. Files of certificates exist on this machine only.
MLFLOW = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
# For s3:// artifacts, and for an MLflow server whose clients store the artifacts.
S3 = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "MLFLOW_S3_ENDPOINT_URL",
)
AZURE = ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET")
HUB = ("HF_TOKEN",)


@dataclass(frozen=True)
class Variables:
    """The environment variables that a study needs.

    Attributes:
        sent: Names and values to send.
        unset: Names in the study's addresses that are not set here, but must be on the cluster.
    """

    sent: Mapping[str, str] = field(repr=False)
    unset: tuple[str, ...]


def needed_variables(config: StudyConfig, environment: Mapping[str, str]) -> Variables:
    """Select the environment variables that a study needs.

    Args:
        config: The study.
        environment: All variables of this process.
    """
    named = [name for uri in _addresses(config) for name in names_in(uri)]
    wanted = dict.fromkeys([*named, *_listed(config)])
    return Variables(
        {name: environment[name] for name in wanted if environment.get(name)},
        tuple(name for name in dict.fromkeys(named) if not environment.get(name)),
    )


def _addresses(config: StudyConfig) -> list[str]:
    images = config.trial.data.train
    given = (config.optuna_storage, config.artifacts, config.tracking.uri)
    return [uri for uri in (*given, images if is_object_uri(images) else None) if uri]


def _listed(config: StudyConfig) -> Iterator[str]:
    artifacts, server = config.artifacts or "", config.tracking.uri or ""
    is_http = server.startswith(("http://", "https://", "$"))
    if is_http:
        yield from MLFLOW
    stores = (artifacts, config.trial.data.train)
    if is_http or any(uri.startswith(("s3://", "$")) for uri in stores):
        yield from S3
    if any(uri.startswith(("abfs://", "abfss://", "$")) for uri in stores):
        yield from AZURE
    if config.trial.backbone.weights == "timm":
        yield from HUB
