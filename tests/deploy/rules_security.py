"""Pod Security "restricted", written out, and what our pods keep beyond it.

https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from drtune_ray import __version__
from tests.deploy.manifests import Object, Pod, pods

SAFE_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
HOST_FIELDS = ("hostNetwork", "hostPID", "hostIPC")
IMAGES = (
    rf"drtune-ray:{re.escape(__version__)}-(cpu|cuda)",
    rf"drtune-ray-mlflow:{re.escape(__version__)}",
    r"postgres:\d+\.\d+-bookworm",
)


def security_problems(objects: tuple[Object, ...]) -> Iterator[str]:
    yield from _namespaces(objects)
    yield from _written_secrets(objects)
    for pod in pods(objects):
        for problem in (*restricted(pod.spec), *beyond_restricted(pod)):
            yield f"{pod}: {problem}"


def _namespaces(objects: tuple[Object, ...]) -> Iterator[str]:
    for one in objects:
        if one["kind"] == "Namespace":
            labels = one["metadata"].get("labels", {})
            if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
                yield "the namespace does not enforce restricted"
            version = labels.get("pod-security.kubernetes.io/enforce-version", "latest")
            if not re.fullmatch(r"v1\.\d+", version):
                yield "a standard without a version changes with the cluster's"


def _written_secrets(objects: tuple[Object, ...]) -> Iterator[str]:
    for one in objects:
        if one["kind"] == "Secret":
            yield "a Secret is made by the user"
    for pod in pods(objects):
        for variable in pod.spec["containers"][0].get("env", []):
            is_secret = re.search("PASSWORD|SECRET|TOKEN|USERNAME", variable["name"])
            if is_secret and "secretKeyRef" not in variable.get("valueFrom", {}):
                yield f"{variable['name']} is written down"


def restricted(spec: Object) -> Iterator[str]:
    """The standard's controls, baseline's included, for Linux pods."""
    security = spec.get("securityContext", {})
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    if any(spec.get(field) for field in HOST_FIELDS):
        yield "shares a namespace of the host"
    for volume in spec.get("volumes", []):
        if set(volume) - {"name"} - SAFE_VOLUMES:
            yield f"volume {volume} is of a kind that restricted forbids"
    if set(security) & {"sysctls", "seLinuxOptions", "appArmorProfile"}:
        yield "sysctls, SELinux and AppArmor are left to the machine"
    for container in containers:
        own = container.get("securityContext", {})
        yield from restricted_container(own, security)
        if any("hostPort" in port for port in container.get("ports", [])):
            yield "hostPort"


def restricted_container(own: Mapping[str, Any], pod: Mapping[str, Any]) -> Iterator[str]:
    if own.get("privileged") or own.get("procMount", "Default") != "Default":
        yield "privileged, or another /proc"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities are not dropped"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities are added"
    both = {**pod, **own}
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield "may run as root"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile"


def beyond_restricted(pod: Pod) -> Iterator[str]:
    security = pod.spec.get("securityContext", {})
    if not security.get("runAsUser") or security["runAsUser"] != security.get("runAsGroup"):
        yield "user and group are said, so that volumes belong to somebody"
    if _mounts_claims(pod):
        if security.get("fsGroup") != security["runAsGroup"]:
            yield "volumes are not writable without fsGroup"
        if security.get("fsGroupChangePolicy") != "OnRootMismatch":
            yield "every file of a large volume is looked at, at every start"
    if pod.spec.get("automountServiceAccountToken") is not pod.is_autoscaled_head:
        yield "a service-account token where none is needed, or none where one is"
    for container in pod.spec["containers"]:
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield "the root file system is writable"
        if not any(re.fullmatch(image, container.get("image", "")) for image in IMAGES):
            yield f"image {container.get('image')} is none of ours, or is not pinned"
        if container.get("imagePullPolicy") != "IfNotPresent":
            yield "imagePullPolicy"
    yield from _autoscaler(pod)


def _mounts_claims(pod: Pod) -> bool:
    templates = pod.owner["spec"].get("volumeClaimTemplates", [])
    volumes = pod.spec.get("volumes", [])
    return bool(templates) or any("persistentVolumeClaim" in volume for volume in volumes)


def _autoscaler(pod: Pod) -> Iterator[str]:
    """A container that KubeRay adds to the head."""
    if pod.is_autoscaled_head:
        assert pod.cluster
        own = pod.cluster["autoscalerOptions"].get("securityContext", {})
        yield from restricted_container(own, pod.spec.get("securityContext", {}))
        if own.get("readOnlyRootFilesystem") is not True:
            yield "the autoscaler's root file system is writable"
