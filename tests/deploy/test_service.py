"""`drtune-ray deploy render --service`: a RayService of the model of a finished study."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from drtune_ray.errors import ConfigError
from drtune_ray.execution.serve_app import ImageService, ServeArguments
from drtune_ray.execution.serving import TOKEN_VARIABLE
from drtune_ray.manifests.render import MAX_NAME, RenderOptions
from drtune_ray.manifests.service import PORT, render_service
from tests.deploy.manifests import OVERLAYS, STUDIES, Object, cluster_spec, pods
from tests.deploy.rules_kuberay import refused_clusters
from tests.deploy.rules_pods import pod_problems
from tests.deploy.rules_security import security_problems
from tests.deploy.rules_versions import version_problems
from tests.deploy.schemas import schema_problems

FILE = STUDIES / "shared-volume.yaml"


def service_of(file: Path = FILE, overlay: str = "kind-cpu", **options: Any) -> tuple[Object, ...]:
    options = {"claim": "storage"} | options
    return render_service(file, RenderOptions(overlay=overlay, **options), 3).objects


def the(kind: str, objects: tuple[Object, ...]) -> Object:
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_service__nothing_to_object(overlay: str) -> None:
    objects = service_of(overlay=overlay)
    assert list(schema_problems(objects)) == []
    for rule in (security_problems, version_problems):
        assert list(rule(objects)) == []
    cluster = cluster_spec(the("RayService", objects))
    assert cluster and list(refused_clusters(cluster)) == []
    # A worker is ready when it answers requests, not when Ray runs there.
    service = the("RayService", objects)["metadata"]["name"]
    asks = f"readinessProbe asks {{'path': '/-/healthz', 'port': {PORT}}}"
    assert list(pod_problems(objects)) == [f"RayService {service}, ray-worker: {asks}"]


def test_service__what_ray_serve_is_told() -> None:
    service = the("RayService", service_of())
    content = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = content["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    arguments = ServeArguments(**application["args"])
    assert arguments.model == "/storage/studies/flowers/winner"
    assert arguments.requires_token
    (deployment,) = application["deployments"]
    assert deployment == {"name": ImageService.name, "num_replicas": 3}
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert workers["replicas"] == arguments.num_replicas == 3
    assert str(int(arguments.num_cpus)) == container["resources"]["limits"]["cpu"]
    assert container["readinessProbe"]["httpGet"]["port"] == content["http_options"]["port"] == PORT


def test_service__every_pod_has_the_token_and_reads_the_model_only() -> None:
    objects = service_of(secret="mine")
    for pod in pods(objects):
        (container,) = pod.spec["containers"]
        secrets = [one for one in container["env"] if "valueFrom" in one]
        reference = {"secretKeyRef": {"name": "mine", "key": TOKEN_VARIABLE}}
        assert secrets == [{"name": TOKEN_VARIABLE, "valueFrom": reference}]
        (mount,) = [m for m in container["volumeMounts"] if m["name"] == "storage"]
        assert mount["readOnly"] is True
        names = {volume["name"] for volume in pod.spec["volumes"]}
        assert {m["name"] for m in container["volumeMounts"]} == names


def test_service__only_clients_reach_the_port() -> None:
    objects = service_of()
    policy = the("NetworkPolicy", objects)
    workers = [pod for pod in pods(objects) if pod.role == "ray-worker"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= workers[0].labels.items()
    (rule,) = policy["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": PORT}]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"drtune-ray/role": "client"}}}]


def test_service__gpu_and_name(tmp_path: Path) -> None:
    content = yaml.safe_load(FILE.read_text()) | {"name": "x" * 80}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    service = the("RayService", service_of(tmp_path / "study.yaml", "gpu", worker_memory_gib=6))
    assert len(service["metadata"]["name"]) <= MAX_NAME
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["memory"]) == ("1", "6144Mi")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["args"]["num_gpus"] == 1


def test_service__refused(tmp_path: Path) -> None:
    content = yaml.safe_load(FILE.read_text()) | {"storage": "/home/me/studies"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as refused:
        service_of(tmp_path / "study.yaml", claim=None, namespace="A", image="x")
    facts = ("--namespace='A'", "--image=x", "give --claim NAME", "storage='/home/me/studies'")
    for fact in facts:
        assert fact in str(refused.value)
