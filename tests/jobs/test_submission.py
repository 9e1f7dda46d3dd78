from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from drtune_ray.config.study import StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.jobs.submission import Submission, study_submission
from drtune_ray.space.search_space import read_space

FLAGS = {"data_folder": "/images", "storage": "/shared/studies"}


def made(file: Path | None = None, *assignments: str, **flags: Any) -> Submission:
    return study_submission(file, assignments, FLAGS | flags)


def test_study_submission__what_was_asked_for_and_no_default_of_this_machine():
    found = made(None, "training.epochs=3", "resources.wait_seconds=5", name="a", seed=7)
    assert yaml.safe_load(found.content) == {
        "storage": "/shared/studies",
        "name": "a",
        "seed": 7,
        "resources": {"wait_seconds": 5},
        "space": read_space("quick"),
        "trial": {
            "data": {"train": "/images", "view_seed": 7},
            "seed": 7,
            "training": {"epochs": 3},
        },
    }


def test_study_submission__files_are_sent_by_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = "parameters:\n  method.bank_size: {int: [8, 64], log: true}\n"
    Path("my.yaml").write_text(space)
    Path("study.yaml").write_text(
        "space: my.yaml\nstart_with: [{method.bank_size: 8}]\ntrial: {training: {epochs: 2}}\n"
    )
    found = yaml.safe_load(made(Path("study.yaml")).content)
    assert found["space"] == yaml.safe_load(space)
    assert found["start_with"] == [{"method.bank_size": 8}]
    assert StudyConfig.from_mapping(found).name == "images"


def test_study_submission__images_in_an_object_store(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    found = made(None, data_folder="s3://bucket/flowers")
    assert yaml.safe_load(found.content)["trial"]["data"]["train"] == "s3://bucket/flowers"
    assert found.variables.sent["AWS_DEFAULT_REGION"] == "eu-north-1"


def test_study_submission__identity_is_name_and_storage(monkeypatch):
    found = made(name="a")
    assert found.submission_id(2) == "drtune-a-844e7bd9-2"
    assert made(None, "trials=50", name="a", storage="/shared//studies/").submission_id(2) == (
        found.submission_id(2)
    )
    others = [made(name="b"), made(name="a", storage="/other")]
    assert len({other.submission_id(2) for other in [found, *others]}) == 3


def test_study_submission__settings_tell_what_changes_the_job(monkeypatch):
    uri = "https://me:$PW@mlflow.example.org"
    monkeypatch.setenv("PW", "one")
    found = made(tracking_uri=uri)
    assert found.settings != made().settings
    assert found.settings != made(None, "trials=50", tracking_uri=uri).settings
    monkeypatch.setenv("PW", "two")  # a hash of it would be seen by others
    assert found.settings == made(tracking_uri=uri).settings
    metadata = found.metadata(3, ["submit", "--data", "/images"])
    assert metadata == {
        "drtune_study": "images",
        "drtune_storage": "/shared/studies",
        "drtune_attempt": "3",
        "drtune_settings": found.settings,
        "drtune_arguments": json.dumps(["submit", "--data", "/images"]),
    }


def test_study_submission__paths_of_this_machine_are_refused_together():
    flags = {"data_folder": "flowers", "weights": "my.pth", "tracking_uri": "sqlite:///mlflow.db"}
    with pytest.raises(ConfigError) as caught:
        study_submission(None, [], flags | {"optuna_storage": "sqlite:///o.db"})
    storage, *others = caught.value.problems
    assert storage.startswith("storage='./drtune-studies' would be in the job's own folder")
    assert "give --storage as the full path" in storage
    assert others == [
        "data.train='flowers' is read on the cluster: give its full path there",
        "backbone.weights='my.pth' is read on the cluster: give its full path there",
        "optuna_storage='sqlite:///o.db' is opened on the cluster: give the file's full path there",
        "tracking.uri='sqlite:///mlflow.db' is opened on the cluster: give the file's full path "
        "there",
    ]


@pytest.mark.parametrize("weights", ["timm", "demo", "/shared/w.pth", "~/w.pth"])
def test_study_submission__paths_of_the_cluster_need_not_be_here(weights):
    found = made(weights=weights, tracking_uri="sqlite:////shared/mlflow.db")
    assert yaml.safe_load(found.content)["trial"]["backbone"] == {"weights": weights}
    assert found.notes == ()


def test_study_submission__what_the_job_will_meet(monkeypatch):
    monkeypatch.delenv("DB_PASSWORD", raising=False)
    found = made(
        tracking_uri="http://localhost:5000", optuna_storage="postgresql://me:$DB_PASSWORD@db/x"
    )
    assert found.notes == (
        "tracking.uri names localhost, which for the job is the machine that it runs on",
        "Not set here, so they must be set on the cluster: DB_PASSWORD",
    )


@pytest.mark.parametrize(
    ("assignments", "problem"),
    [
        (["trial.method.bank_siz=8"], "unknown key 'trial.method.bank_siz'; did you mean 'tri"),
        (["space=quik"], "space 'quik' is neither a YAML file nor one of"),
        (
            ["start_with=[{method.bank_size: -1}]"],
            "start_with, point 1: method.bank_size=-1 is not in the search space",
        ),
    ],
)
def test_study_submission__settings_are_checked_here(assignments, problem):
    with pytest.raises(ConfigError) as caught:
        made(None, *assignments)
    assert str(caught.value).startswith(problem)
