"""Render the RayService that answers with a study's model, from the templates of `deploy/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from drtune_ray.config.study import StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.execution.serving import APPLICATION, DEPLOYMENT, TOKEN_VARIABLE
from drtune_ray.manifests.overlays import overlaid_rayjob
from drtune_ray.manifests.pod_storage import STORAGE_PATH, STUDIES_PATH
from drtune_ray.manifests.pods import GPU, memory_mib, set_resources
from drtune_ray.manifests.render import (
    Rendered,
    RenderOptions,
    disruption_budget,
    image_problems,
    name_problems,
    object_name,
    set_image,
    set_secrets,
)
from drtune_ray.storage.record import WINNER_NAME
from drtune_ray.values import read_yaml

PORT = 8000
SUFFIX = "-model"
CLIENT = {"drtune-ray/role": "client"}  # label of the pods that may ask
IMPORT_PATH = "drtune_ray.execution.serve_app:build"


def render_service(study_file: Path, options: RenderOptions, num_replicas: int) -> Rendered:
    """Render a RayService of a study's model, and who may reach it.

    Args:
        study_file: File of the study.
        options: Options of the cluster; the claim holds the study.
        num_replicas: Number of pods with the model.

    Raises:
        ConfigError: If the pods cannot read the model, or an option is not valid.
    """
    given = read_yaml(study_file, with_lines=True)
    config = StudyConfig.from_mapping(given)
    rayjob = overlaid_rayjob(options.overlay)
    if found := list(_problems(config, given, options)):
        raise ConfigError(found)
    name = object_name(f"{config.name}{SUFFIX}")
    cluster = rayjob["spec"]["rayClusterSpec"]
    _fill_cluster(cluster, name, options, num_replicas)
    folder = config.storage if "storage" in given else STUDIES_PATH
    service: dict[str, Any] = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "drtune-ray"}},
        "spec": {
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": _serve_config(f"{folder}/{config.name}", cluster, num_replicas),
            "rayClusterConfig": cluster,
        },
    }
    objects = (_network_policy(name), disruption_budget(name), service)
    for one in objects:
        one["metadata"]["namespace"] = options.namespace
    return Rendered(objects, (_note(name, options),))


def _note(name: str, options: RenderOptions) -> str:
    (label,) = CLIENT.items()
    return (
        f"Secret {options.secret} in {options.namespace} must hold {TOKEN_VARIABLE}; pods with the "
        f"label {': '.join(label)} reach the model at http://{name}-serve-svc:{PORT}/"
    )


def _problems(
    config: StudyConfig, given: Mapping[str, Any], options: RenderOptions
) -> Iterator[str]:
    yield from name_problems(options)
    yield from image_problems(options.image)
    if options.claim is None:
        yield (
            f"the pods read the model of study {config.name!r} from a volume: give --claim NAME, "
            f"which holds {STUDIES_PATH[1:]}/{config.name}/{WINNER_NAME}"
        )
    if "storage" in given and not config.storage.startswith(f"{STORAGE_PATH}/"):
        yield (
            f"storage={config.storage!r} is not on the volume, which is mounted at {STORAGE_PATH}: "
            "leave it out, or put the study below that"
        )


def _serve_config(folder: str, cluster: Mapping[str, Any], num_replicas: int) -> str:
    """Return the configuration of Ray Serve as YAML, which the operator hands to the head."""
    (workers,) = cluster["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    share = {"num_cpus": int(limits["cpu"]), "num_gpus": int(limits.get(GPU, 0))}
    content = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT},  # nosec B104 # within its pod
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {
                    "model": f"{folder}/{WINNER_NAME}",
                    "requires_token": True,  # nosec B105 # yes or no, no secret
                    "num_replicas": num_replicas,
                    **share,
                },
                "deployments": [{"name": DEPLOYMENT, "num_replicas": num_replicas}],
            }
        ],
    }
    return yaml.safe_dump(content, sort_keys=False)


def _fill_cluster(
    cluster: dict[str, Any], name: str, options: RenderOptions, num_replicas: int
) -> None:
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    head["resources"] = {"CPU": "0"}  # no replica there
    workers["replicas"] = workers["minReplicas"] = workers["maxReplicas"] = num_replicas
    cluster["enableInTreeAutoscaling"] = False
    cluster.pop("autoscalerOptions", None)
    head["template"]["spec"]["automountServiceAccountToken"] = False  # the autoscaler's
    set_image(cluster, options.image)
    for template in (head["template"], workers["template"]):
        template["metadata"]["labels"]["drtune-ray/cluster"] = name
        _mount(template["spec"], options)
        set_secrets(template["spec"], options.secret, [{"key": TOKEN_VARIABLE}])
    (container,) = workers["template"]["spec"]["containers"]
    container["ports"] = [{"name": "serve", "containerPort": PORT}]
    container["readinessProbe"]["httpGet"] = {"path": "/-/healthz", "port": PORT}
    for spec, gib in (
        (head["template"]["spec"], options.head_memory_gib),
        (workers["template"]["spec"], options.worker_memory_gib),
    ):
        memory = 1024 * gib if gib is not None else memory_mib(spec["containers"][0])
        gpus = spec["containers"][0]["resources"]["limits"].get(GPU, 0)
        set_resources(spec, memory=memory, gpus=int(gpus))


def _mount(pod: dict[str, Any], options: RenderOptions) -> None:
    """Mount the study's volume, read-only, in the place of the template's."""
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "study"]
    (container,) = pod["containers"]
    container["volumeMounts"] = [
        mount | ({"readOnly": True} if mount["name"] == "storage" else {})
        for mount in container["volumeMounts"]
        if mount["name"] != "study"
    ]
    for volume in pod["volumes"]:
        if volume["name"] == "storage":
            volume["persistentVolumeClaim"] = {"claimName": options.claim, "readOnly": True}


def _network_policy(name: str) -> dict[str, Any]:
    """Return the policy that lets clients, and nobody else, reach the workers' port."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "drtune-ray"}},
        "spec": {
            "podSelector": {
                "matchLabels": {"drtune-ray/role": "ray-worker", "drtune-ray/cluster": name}
            },
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [{"podSelector": {"matchLabels": CLIENT}}],
                    "ports": [{"protocol": "TCP", "port": PORT}],
                }
            ],
        },
    }
