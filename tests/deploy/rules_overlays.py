"""What each overlay is for: which machines, which volumes, who wakes a study."""

from __future__ import annotations

from collections.abc import Iterator

from tests.deploy.manifests import Object, cluster_spec, key
from tests.deploy.rules_pods import DRAIN

GPU_NODES = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
GKE_SPOT = {
    "key": "cloud.google.com/gke-spot",
    "operator": "Equal",
    "value": "true",
    "effect": "NoSchedule",
}
TOLERATED = {"gke": [GPU_NODES, GKE_SPOT]}
NODES = {
    "gke": {
        "cloud.google.com/gke-spot": "true",
        "cloud.google.com/gke-accelerator": "nvidia-l4",
    },
    "eks": {"eks.amazonaws.com/capacityType": "SPOT"},
}
STORAGE_CLASS = {"gke": "standard-rwx", "eks": "efs-sc"}
SPOT = ("gpu-spot", "gke", "eks")
QUEUE = {"kueue.x-k8s.io/queue-name": "drtune-ray"}


def overlay_problems(objects: tuple[Object, ...], overlay: str) -> Iterator[str]:
    for one in objects:
        if cluster := cluster_spec(one):
            for group in cluster["workerGroupSpecs"]:
                yield from _machines(one, group, overlay)
        if one["kind"] == "RayJob":
            yield from _waking(one, overlay)
        if one["kind"] == "PersistentVolumeClaim":
            yield from _volume(one["metadata"]["name"], one["spec"], overlay)
        for claim in one.get("spec", {}).get("volumeClaimTemplates", []):
            yield from _volume("of a pod", claim["spec"], overlay)


def _machines(one: Object, group: Object, overlay: str) -> Iterator[str]:
    is_gpu = group["groupName"] == "gpu"
    spec = group["template"]["spec"]
    name = f"{key(one)} {group['groupName']}"
    if spec.get("nodeSelector", {}) != (NODES.get(overlay, {}) if is_gpu else {}):
        yield f"{name} runs on {spec.get('nodeSelector')}"
    tolerated = TOLERATED.get(overlay, [GPU_NODES]) if is_gpu else []
    if spec.get("tolerations", []) != tolerated:
        yield f"{name} tolerates {spec.get('tolerations')}"
    names = [variable["name"] for variable in spec["containers"][0]["env"]]
    if (DRAIN in names) != (is_gpu and overlay in SPOT):
        yield f"{name}: machines that may be taken away leave trials their time, no other"


def _waking(one: Object, overlay: str) -> Iterator[str]:
    is_queued = overlay == "kueue"
    labels = one["metadata"].get("labels", {})
    if (QUEUE.items() <= labels.items()) != is_queued:
        yield f"{key(one)} has labels {labels}"
    is_template = one["metadata"]["name"] == "study"
    if one["spec"].get("suspend", False) is not (is_template or is_queued):
        yield f"{key(one)}: the base's study sleeps, one that was rendered does not"


def _volume(name: str, spec: Object, overlay: str) -> Iterator[str]:
    is_shared = name == "storage"
    mode = "ReadWriteMany" if is_shared and overlay != "kind-cpu" else "ReadWriteOnce"
    if spec.get("accessModes") != [mode]:
        yield f"claim {name}: {spec.get('accessModes')}"
    if spec.get("storageClassName") != (STORAGE_CLASS.get(overlay) if is_shared else None):
        yield f"claim {name} is of class {spec.get('storageClassName')}"
