from __future__ import annotations

from typing import Any

import pytest

from drtune_ray.config.study import StudyConfig
from drtune_ray.jobs.env_vars import (
    AZURE,
    HUB,
    MLFLOW,
    S3,
    needed_variables,
)
from drtune_ray.values import nested

# What a machine may hold, every listed name among it.
OTHERS = {
    name: f"of {name}"
    for name in (
        "RAY_AUTH_TOKEN",
        "RAY_ADDRESS",
        "HOME",
        "PATH",
        "PYTHONPATH",
        "SSH_AUTH_SOCK",
        "GITHUB_TOKEN",
        "AWS_PROFILE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "MLFLOW_RUN_ID",
        "MLFLOW_TRACKING_SERVER_CERT_PATH",
        "OMP_NUM_THREADS",
        "DATABASE_PASSWORD",
    )
}
MACHINE = OTHERS | {name: f"of {name}" for name in (*MLFLOW, *S3, *AZURE, *HUB)}


def study(**changes: Any) -> StudyConfig:
    values = {"name": "a", "trial.data.train": "/images", "trial.backbone.weights": "demo"}
    return StudyConfig.from_mapping(nested(values | changes))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, set()),
        ({"trial.backbone.weights": "timm"}, set(HUB)),
        ({"trial.backbone.weights": "/weights.pt"}, set()),
        ({"tracking.uri": "sqlite:////shared/mlflow.db"}, set()),
        ({"tracking.uri": "https://mlflow.example.org"}, {*MLFLOW, *S3}),
        ({"artifacts": "s3://bucket/prefix"}, set(S3)),
        ({"artifacts": "gs://bucket/prefix"}, set()),
        ({"artifacts": "file:///shared"}, set()),
        ({"artifacts": "abfss://container@account/prefix"}, set(AZURE)),
        (
            {"optuna_storage": "postgresql://me:$DATABASE_PASSWORD@db/x"},
            {"DATABASE_PASSWORD"},
        ),
        ({"optuna_storage": "$DATABASE_PASSWORD"}, {"DATABASE_PASSWORD"}),
        ({"artifacts": "${GITHUB_TOKEN}"}, {"GITHUB_TOKEN", *S3, *AZURE}),
    ],
)
def test_needed_variables__no_others(changes: dict[str, Any], names: set[str]) -> None:
    found = needed_variables(study(**changes), MACHINE)
    assert found.sent == {name: f"of {name}" for name in names}
    assert found.unset == ()
    assert "of " not in repr(found)


def test_needed_variables__what_is_not_set_here() -> None:
    uri = "postgresql://$DB_USER:$DB_PASSWORD@db/x"
    changes = {"optuna_storage": uri, "tracking.uri": "https://me:${DB_PASSWORD}@host"}
    found = needed_variables(study(**changes), {"DB_USER": "me", "DB_PASSWORD": ""})
    assert found.sent == {"DB_USER": "me"}
    assert found.unset == ("DB_PASSWORD",)  # and no name of a list
