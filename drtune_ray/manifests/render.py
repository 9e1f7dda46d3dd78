"""Render the RayJob of a study from its file and the templates of `deploy/`."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drtune_ray.config.study import StudyConfig
from drtune_ray.errors import ConfigError
from drtune_ray.manifests import pod_storage
from drtune_ray.manifests.overlays import base_objects, overlaid_rayjob
from drtune_ray.manifests.pod_storage import DATA_PATH, STUDIES_PATH
from drtune_ray.manifests.pods import (
    DRIVER_GIB,
    WorkerPods,
    memory_mib,
    set_resources,
    trials_at_a_time,
    worker_pods,
)
from drtune_ray.server_uri import names_in
from drtune_ray.space.search_space import SearchSpace, read_space, shipped_spaces
from drtune_ray.values import read_yaml

# KubeRay's limit: it appends to the name. A DNS name starts with a letter.
MAX_NAME = 47
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
OTHER_NAME = re.compile(r"(?!.{64})[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# The grammar of image names: [HOST[:PORT]/]PATH[:TAG][@DIGEST].
IMAGE = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?"
    r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?P<digest>@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
STUDY_FOLDER = "/etc/drtune"
STUDY_KEY, SPACE_KEY = "study.yaml", "space.yaml"
SCRATCH = "50Gi"
S3_NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
MLFLOW_NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@dataclass(frozen=True)
class RenderOptions:
    """Options of the cluster that a study runs on.

    Attributes:
        overlay: Name of a folder in `deploy/overlays`.
        namespace: Namespace of all objects.
        claim: Volume claim that every pod mounts under ``/storage``.
        data_claim: Volume claim that the head mounts, read-only, under ``/data``.
        secret: Secret whose keys are the environment variables that the study names.
        image: Image of all containers; None keeps the template's.
        worker_memory_gib: Memory of a trial's worker in GiB; None keeps the template's.
        head_memory_gib: Memory of the head in GiB; None derives it from the template and the
            number of concurrent trials.
        deadline_hours: Time limit of the whole study in hours, including retries.
    """

    overlay: str
    namespace: str = "drtune-ray"
    claim: str | None = None
    data_claim: str | None = None
    secret: str = "drtune-study"
    image: str | None = None
    worker_memory_gib: int | None = None
    head_memory_gib: int | None = None
    deadline_hours: int = 24


@dataclass(frozen=True)
class Rendered:
    """Objects for ``kubectl apply``, with notes about defaults and prerequisites."""

    objects: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


def render_study(study_file: Path, options: RenderOptions) -> Rendered:
    """Render a study's RayJob, a ConfigMap of its file, and a disruption budget for its head.

    Raises:
        ConfigError: If the study cannot run in pods; every problem is named.
    """
    given = read_yaml(study_file, with_lines=True)
    config = StudyConfig.from_mapping(given)
    rayjob = overlaid_rayjob(options.overlay)
    pods = worker_pods(config)
    if found := list(_problems(config, given, rayjob, pods, options)):
        raise ConfigError(found)
    name = object_name(config.name)
    files = _files(study_file, config)
    _fill(rayjob, name, options)
    rayjob["spec"]["entrypoint"] = _entrypoint(given, config, files)
    _fill_cluster(rayjob["spec"]["rayClusterSpec"], config, pods, name, options)
    objects = (_config_map(name, files), disruption_budget(name), rayjob)
    for one in objects:
        one["metadata"]["namespace"] = options.namespace
    return Rendered(objects, tuple(_notes(config, pods, options)))


def object_name(study: str) -> str:
    """Return the study's name, or a valid Kubernetes name derived from it without collisions."""
    if NAME.fullmatch(study) and len(study) <= MAX_NAME:
        return study
    plain = re.sub(r"[^a-z0-9]+", "-", study.lower()).strip("-")
    mark = hashlib.sha256(study.encode()).hexdigest()[:8]
    plain = plain if plain[:1].isalpha() else f"study-{plain}"
    return f"{plain[: MAX_NAME - len(mark) - 1].rstrip('-')}-{mark}"


def _problems(
    config: StudyConfig,
    given: Mapping[str, Any],
    rayjob: Mapping[str, Any],
    pods: WorkerPods,
    options: RenderOptions,
) -> Iterator[str]:
    yield from name_problems(options)
    yield from _taken_names(config.name)
    yield from image_problems(options.image)
    yield from pod_storage.problems(
        config,
        given,
        has_claim=options.claim is not None,
        has_data_claim=options.data_claim is not None,
    )
    if config.trial.backbone.weights == "demo":
        yield (
            "backbone.weights='demo' is not in the image, which holds no weights: put a file on a "
            "volume and give its path"
        )
    group = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    if (group == "gpu") != bool(pods.num_gpus):
        yield (
            f"overlay {options.overlay} has workers of group {group!r}, but a worker of the study "
            f"needs {pods.num_gpus} GPUs: set resources.gpus_per_worker, or use another overlay"
        )
    seconds = options.deadline_hours * 3600
    if (config.budget.max_seconds or 0) >= seconds:
        yield (
            f"budget.max_seconds={config.budget.max_seconds:g} must be below the deadline of "
            f"{options.deadline_hours} hours, which includes the finals: raise --deadline-hours"
        )
    yield from _space_problems(config)


def name_problems(options: RenderOptions) -> Iterator[str]:
    """Yield a message for each option that is no Kubernetes name."""
    names = {
        "--namespace": options.namespace,
        "--claim": options.claim,
        "--data-claim": options.data_claim,
        "--secret": options.secret,
    }
    for option, name in names.items():
        if name is not None and not OTHER_NAME.fullmatch(name):
            yield (
                f"{option}={name!r} is not a valid Kubernetes name: give up to 63 lower-case "
                "letters, digits and '-', with a letter or digit at both ends"
            )


def _taken_names(study: str) -> Iterator[str]:
    """Yield a message if the study's objects would replace some of the base, or be taken for it."""
    name = object_name(study)
    made = {
        ("RayJob", name),
        ("RayCluster", name),  # its pods would have the same labels
        ("ConfigMap", _file_name(name)),
        ("PodDisruptionBudget", _budget_name(name)),
    }
    if taken := sorted(f"{kind} {name}" for kind, name in made & base_objects()):
        yield (
            f"study {study!r} would take the place of {', '.join(taken)} of deploy/base: give it "
            "another name"
        )


def image_problems(image: str | None) -> Iterator[str]:
    """Yield a message if an image is not named, or stands for another one every day."""
    if image is None:
        return
    found = IMAGE.fullmatch(image)
    if found is None:
        yield (
            f"--image={image!r} is not the name of an image: write it like "
            "REGISTRY/drtune-ray:0.1.0-cuda or REGISTRY/drtune-ray@sha256:DIGEST"
        )
    elif found["digest"] is None and found["tag"] in (None, "latest"):
        yield (
            f"--image={image} stands for another image every day: give its tag, such as "
            ":0.1.0-cuda, or its digest"
        )


def _space_problems(config: StudyConfig) -> Iterator[str]:
    space = read_space(config.space) if isinstance(config.space, str) else config.space
    try:
        SearchSpace.from_mapping(space, config.trial)
    except ConfigError as error:
        yield from error.problems


def _files(study_file: Path, config: StudyConfig) -> dict[str, str]:
    """Return the content of the study file, and of its space's file if it names one."""
    files = {STUDY_KEY: study_file.read_text()}
    if isinstance(config.space, str) and config.space not in shipped_spaces():
        files[SPACE_KEY] = Path(config.space).read_text()
    return files


def _entrypoint(given: Mapping[str, Any], config: StudyConfig, files: Mapping[str, str]) -> str:
    """Return the head's command; it sets what would otherwise follow from the head's size."""
    command = ["drtune-ray", "tune", f"{STUDY_FOLDER}/{STUDY_KEY}"]
    if "storage" not in given:
        command += ["--storage", STUDIES_PATH]
    if SPACE_KEY in files:
        command += ["--space", f"{STUDY_FOLDER}/{SPACE_KEY}"]
    command += ["--set", f"resources.trials_at_a_time={trials_at_a_time(config)}"]
    command += ["--set", f"resources.cpus_per_worker={config.resources.cpus_per_worker}"]
    return shlex.join(command)


def _fill(rayjob: dict[str, Any], name: str, options: RenderOptions) -> None:
    rayjob["metadata"]["name"] = name
    rayjob["spec"]["activeDeadlineSeconds"] = options.deadline_hours * 3600
    spec = rayjob["spec"]
    set_image(spec["rayClusterSpec"], options.image, [spec["submitterPodTemplate"]])


def set_image(
    cluster: dict[str, Any], image: str | None, others: Iterable[dict[str, Any]] = ()
) -> None:
    """Set the image of a cluster's pods and of other pods; None keeps the template's."""
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for template in (*others, *(group["template"] for group in groups)):
        if image is not None:
            template["spec"]["containers"][0]["image"] = image


def _fill_cluster(
    cluster: dict[str, Any],
    config: StudyConfig,
    pods: WorkerPods,
    name: str,
    options: RenderOptions,
) -> None:
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    head["resources"]["trial_driver"] = str(pods.num_drivers)
    workers["maxReplicas"] = pods.count
    if not cluster["enableInTreeAutoscaling"]:
        workers["replicas"] = workers["minReplicas"] = pods.count
    for template in (head["template"], workers["template"]):
        template["metadata"]["labels"]["drtune-ray/cluster"] = name
        _mount(template["spec"], name, options)
    _set_sizes(head["template"]["spec"], workers["template"]["spec"], pods, options)
    set_secrets(head["template"]["spec"], options.secret, _head_secrets(config))
    set_secrets(workers["template"]["spec"], options.secret, _artifact_secrets(config))


def _set_sizes(
    head: dict[str, Any], worker: dict[str, Any], pods: WorkerPods, options: RenderOptions
) -> None:
    waiting = DRIVER_GIB * pods.num_drivers if pods.drivers_take_memory else 0.0
    memory = memory_mib(head["containers"][0]) + round(1024 * waiting)
    if options.head_memory_gib is not None:
        memory = 1024 * options.head_memory_gib
    set_resources(head, memory=memory)
    each = memory_mib(worker["containers"][0])
    if options.worker_memory_gib is not None:
        each = 1024 * options.worker_memory_gib
    memory = each * pods.workers_each
    set_resources(worker, memory=memory, cpus=pods.num_cpus, gpus=pods.num_gpus)


def _mount(pod: dict[str, Any], name: str, options: RenderOptions) -> None:
    """Replace the template's volumes by those of the study."""
    is_head = False
    for volume in pod["volumes"]:
        if volume["name"] == "storage":
            volume.pop("persistentVolumeClaim")
            volume |= _storage(options.claim)
        elif volume["name"] == "study":
            volume["configMap"]["name"] = _file_name(name)
            is_head = True
    if options.data_claim is not None and is_head:  # only the driver reads images and weights
        claim = {"claimName": options.data_claim, "readOnly": True}
        pod["volumes"].append({"name": "data", "persistentVolumeClaim": claim})
        mount = {"name": "data", "mountPath": DATA_PATH, "readOnly": True}
        pod["containers"][0]["volumeMounts"].append(mount)


def _storage(claim: str | None) -> dict[str, Any]:
    if claim is None:  # artifacts hold what must last
        return {"emptyDir": {"sizeLimit": SCRATCH}}
    return {"persistentVolumeClaim": {"claimName": claim}}


def _head_secrets(config: StudyConfig) -> list[dict[str, Any]]:
    """Return the secrets of the head; only the driver opens the database and MLflow."""
    addresses = [config.optuna_storage, config.tracking.uri]
    needed = [name for uri in addresses for name in names_in(uri or "")]
    if (config.tracking.uri or "").startswith(("http://", "https://")):
        needed += MLFLOW_NAMES
    of_artifacts = _artifact_secrets(config)
    given = {secret["key"] for secret in of_artifacts}
    return [{"key": name} for name in dict.fromkeys(needed) if name not in given] + of_artifacts


def _artifact_secrets(config: StudyConfig) -> list[dict[str, Any]]:
    """Return the secrets for artifacts; S3 keys are optional, since a pod may have a role."""
    uri = config.artifacts or ""
    needed: list[dict[str, Any]] = [{"key": name} for name in names_in(uri)]
    if uri.startswith("s3://"):
        needed += [{"key": name, "optional": True} for name in S3_NAMES]
    return needed


def set_secrets(pod: dict[str, Any], secret: str, keys: Iterable[dict[str, Any]]) -> None:
    """Let keys of a Secret be the only variables of a pod that have no plain value."""
    container = pod["containers"][0]
    plain = [variable for variable in container["env"] if "valueFrom" not in variable]
    container["env"] = plain + [
        {"name": key["key"], "valueFrom": {"secretKeyRef": {"name": secret} | key}} for key in keys
    ]


def _file_name(name: str) -> str:
    """Return the name of the study's ConfigMap."""
    return f"{name}-file"


def _budget_name(name: str) -> str:
    """Return the name of the disruption budget of a study's head."""
    return f"{name}-head"


def _config_map(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    metadata = {"name": _file_name(name), "labels": {"app.kubernetes.io/part-of": "drtune-ray"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": dict(files)}


def disruption_budget(name: str) -> dict[str, Any]:
    """Return the budget that keeps the head of a cluster from being evicted."""
    labels = {"drtune-ray/role": "ray-head", "drtune-ray/cluster": name}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {
            "name": _budget_name(name),
            "labels": {"app.kubernetes.io/part-of": "drtune-ray"},
        },
        "spec": {"minAvailable": 1, "selector": {"matchLabels": labels}},
    }


def _notes(config: StudyConfig, pods: WorkerPods, options: RenderOptions) -> Iterator[str]:
    if config.resources.trials_at_a_time is None:
        yield (
            f"resources.trials_at_a_time is not set: {trials_at_a_time(config)} trials at a time, "
            f"on {pods.count} pods"
        )
    keys = [key["key"] for key in _head_secrets(config) if not key.get("optional")]
    if keys:
        yield f"Secret {options.secret} in {options.namespace} must hold {', '.join(keys)}"
    if config.trial.backbone.weights == "timm":
        yield (
            "backbone.weights=timm: the head downloads them from timm's hub, which the network "
            "policies of deploy/base do not allow; the component object-store does"
        )


class _Dumper(yaml.SafeDumper):
    """Writes multi-line strings as blocks, and repeated objects in full instead of as aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_documents(objects: Iterable[Mapping[str, Any]]) -> str:
    """Return one YAML document per object, keeping the order of keys."""
    return yaml.dump_all(map(dict, objects), Dumper=_Dumper, sort_keys=False, explicit_start=True)
