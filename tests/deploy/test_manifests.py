"""Every manifest against the schemas, KubeRay's rules, Pod Security and what it refers to."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from drtune_ray.manifests.render import RenderOptions, render_study
from tests.deploy.checks import rule_problems
from tests.deploy.manifests import (
    KUSTOMIZED,
    OVERLAYS,
    RENDERS,
    Object,
    Render,
    applied,
    cluster_spec,
    key,
    kustomized,
    quantity,
    rendered,
)
from tests.deploy.rules_kuberay import refused_clusters, refused_jobs
from tests.deploy.schemas import KUBERAY_KINDS, KUBERNETES, problems_of, schema_problems


@pytest.mark.parametrize("folder", KUSTOMIZED)
def test_kustomize__nothing_to_object(folder: str) -> None:
    objects = kustomized(folder)
    assert list(schema_problems(objects)) == []
    assert list(rule_problems(objects, folder.split("/")[-1])) == []


@pytest.mark.parametrize("render", RENDERS, ids=str)
def test_render__nothing_to_object(render: Render) -> None:
    assert list(schema_problems(rendered(render))) == []
    assert list(rule_problems(applied(render), render.overlay)) == []


@pytest.mark.parametrize("folder", KUSTOMIZED)
def test_kustomize__kubernetes_validate_agrees(folder: str) -> None:
    for one in kustomized(folder):
        if one["kind"] not in KUBERAY_KINDS:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_schemas__refuse_what_is_misspelt() -> None:
    (job,) = [one for one in kustomized("base") if one["kind"] == "RayJob"]
    wrong = copy.deepcopy(job)
    wrong["spec"]["entrypointt"] = wrong["spec"].pop("entrypoint")
    assert len(list(problems_of(wrong))) == 1
    service = copy.deepcopy(next(one for one in kustomized("base") if one["kind"] == "Service"))
    service["spec"]["ports"][0]["porrt"] = 1
    assert len(list(problems_of(service))) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_render__is_the_overlay_with_the_study_in_it(overlay: str, tmp_path: Path) -> None:
    """Two ways to the same RayJob: kustomize's patches, and ours."""
    there = {key(one): one for one in kustomized(f"overlays/{overlay}")}
    expected = copy.deepcopy(there["RayJob", "study"])
    if overlay != "kueue":
        assert expected["spec"].pop("suspend") is True
    file, content = tmp_path / "study.yaml", there["ConfigMap", "study-file"]["data"]["study.yaml"]
    # Under its own name it would take the place of the base's.
    file.write_text(re.sub("^name: study$", "name: other", content, flags=re.MULTILINE))
    options = RenderOptions(overlay=overlay, claim="storage")
    made = {key(one): one for one in render_study(file, options).objects}["RayJob", "other"]
    got = yaml.safe_load(re.sub(r"\bother\b", "study", yaml.safe_dump(made)))
    for one in (got, expected):
        del one["spec"]["entrypoint"]
        cluster = cluster_spec(one)
        assert cluster
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            _in_mebibytes(group["template"]["spec"])
    assert got == expected


def _in_mebibytes(spec: Object) -> None:
    shares = spec["containers"][0]["resources"]
    for share in (shares["requests"], shares["limits"]):
        share["memory"] = quantity(share["memory"])
    for volume in spec["volumes"]:
        if volume["name"] == "shm":
            volume["emptyDir"]["sizeLimit"] = quantity(volume["emptyDir"]["sizeLimit"])


JOB = {"rayClusterSpec": {"headGroupSpec": {"template": {"spec": {"restartPolicy": "Always"}}}}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"suspend": True}, "suspend needs shutdownAfterJobFinishes"),
        ({"ttlSecondsAfterFinished": 5}, "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
        (
            {"backoffLimit": 1, "submissionMode": "InteractiveMode"},
            "backoffLimit in InteractiveMode",
        ),
        ({"submissionMode": "SidecarMode"}, "restartPolicy of the head in SidecarMode"),
        (
            {"deletionStrategy": {}},
            "deletionStrategy needs deletionRules, or onSuccess and onFailure",
        ),
        (
            {
                "shutdownAfterJobFinishes": True,
                "deletionStrategy": {
                    "deletionRules": [
                        {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}
                    ]
                },
            },
            "deletionRules with shutdownAfterJobFinishes",
        ),
        ({"runtimeEnvYAML": "[]"}, "runtimeEnvYAML is no mapping"),
    ],
)
def test_refused_jobs__what_kuberay_refuses(change: dict[str, Any], problem: str) -> None:
    assert list(refused_jobs(JOB)) == []
    assert list(refused_jobs(JOB | change)) == [problem]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"authOptions": {"mode": "token"}}, "authOptions needs rayVersion from 2.52, but it is 0"),
        (
            {"enableInTreeAutoscaling": True, "autoscalerOptions": {"version": "v2"}},
            "restartPolicy with autoscaler v2",
        ),
    ],
)
def test_refused_clusters__what_kuberay_refuses(change: dict[str, Any], problem: str) -> None:
    pod = {"spec": {"containers": [{}], "restartPolicy": "Always"}}
    cluster: Object = {"headGroupSpec": {"template": pod}, "workerGroupSpecs": []}
    assert list(refused_clusters(cluster)) == []
    assert list(refused_clusters(cluster | change)) == [problem]


def test_refused_clusters__resources_twice() -> None:
    head = {
        "template": {"spec": {"containers": [{}]}},
        "rayStartParams": {"num-cpus": "0"},
        "resources": {"trial_driver": "1"},
    }
    cluster = {"headGroupSpec": head, "workerGroupSpecs": []}
    assert list(refused_clusters(cluster)) == ["resources both in the group and in rayStartParams"]
