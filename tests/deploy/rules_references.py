"""What a manifest names exists (objects, keys, labels, ports), or a user is told to make it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from tests.deploy.manifests import ROOT, Object, Pod, cluster_spec, key, pods

PART_OF = {"app.kubernetes.io/part-of": "drtune-ray"}
QUEUE = {"kueue.x-k8s.io/queue-name": "drtune-ray"}
RAY_PORTS = {"gcs": 6379, "dashboard": 8265}
# Kueue's queue, the claim of images, and Secrets are made by the user, as docs/kubernetes.md says.
USERS_CLAIMS = {"images"}
DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


@cache
def documented_secrets() -> dict[str, set[str]]:
    """Names and keys of the Secrets that docs/kubernetes.md tells how to make."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    made: dict[str, set[str]] = {}
    for name, lines in re.findall(r"^secret_from_stdin (\S+) <<END\n(.*?)^END$", text, re.M | re.S):
        made.setdefault(name, set()).update(re.findall(r"^([^=\s]+)=", lines, re.M))
    return made


def reference_problems(objects: tuple[Object, ...]) -> Iterator[str]:
    yield from _metadata(objects)
    there = {key(one): one for one in objects}
    for pod in pods(objects):
        for problem in (*_named(pod, there), *_secrets(pod)):
            yield f"{pod}: {problem}"
    for one in objects:
        if one["kind"] == "Service":
            yield from _service(one, objects)
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield from _selector(one, there)
        if one["kind"] == "PodDisruptionBudget":
            yield from _budget(one, objects)
    yield from _used(objects)
    yield from _claims(objects)


def _metadata(objects: tuple[Object, ...]) -> Iterator[str]:
    namespaces = {one["metadata"].get("name") for one in objects if one["kind"] == "Namespace"}
    if len({key(one) for one in objects}) < len(objects):
        yield "an object twice"
    for one in objects:
        metadata = one["metadata"]
        name = metadata.get("name", "")
        if not DNS_1123.fullmatch(name) or len(name) > 63:
            yield f"{one['kind']} name {name!r}"
        if set(metadata) - {"name", "namespace", "labels", "annotations"}:
            yield f"metadata {sorted(metadata)}"
        expected = set() if one["kind"] == "Namespace" else namespaces
        if {metadata["namespace"]} != expected if "namespace" in metadata else expected:
            yield f"{name} is in namespace {metadata.get('namespace')}"
        labels = dict(metadata.get("labels", {}))
        if one["kind"] == "Namespace":
            labels = {k: v for k, v in labels.items() if "pod-security" not in k}
        if labels not in (PART_OF, PART_OF | QUEUE):
            yield f"labels of {one['kind']} {name}: {labels}"


def _named(pod: Pod, there: dict[tuple[str, str], Object]) -> Iterator[str]:
    account = there.get(("ServiceAccount", pod.spec.get("serviceAccountName", "")))
    if account is None or account.get("automountServiceAccountToken") is not False:
        yield "its account is not there, or brings a token"
    for volume in pod.spec.get("volumes", []):
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and ("PersistentVolumeClaim", claim) not in there and claim not in USERS_CLAIMS:
            yield f"claim {claim} is not there"
        config = volume.get("configMap", {}).get("name")
        if config and ("ConfigMap", config) not in there:
            yield f"ConfigMap {config} is not there"
    if pod.is_ray and pod.labels.get("drtune-ray/cluster") != pod.owner["metadata"]["name"]:
        yield "labelled as of another cluster"
    allowed = {"drtune-ray/role", "drtune-ray/cluster"} if pod.is_ray else {"drtune-ray/role"}
    if set(pod.labels) != allowed:
        yield f"labels {pod.labels}"
    if set(pod.template["metadata"]) - {"labels", "annotations"}:
        yield "metadata of a template"


def _secrets(pod: Pod) -> Iterator[str]:
    for variable in pod.spec["containers"][0].get("env", []):
        if "valueFrom" not in variable:
            continue
        reference = variable["valueFrom"].get("secretKeyRef", {})
        keys = documented_secrets().get(reference.get("name", ""), set())
        if reference.get("key") not in keys:
            yield f"nobody is told to make {reference}"
        if pod.is_ray and reference.get("key") != variable["name"]:
            yield f"{variable['name']} is {reference}"
        is_optional = str(reference.get("key")).startswith("AWS_")
        if reference.get("optional", False) is not is_optional:
            yield f"{reference} may be missing"


def _service(one: Object, objects: tuple[Object, ...]) -> Iterator[str]:
    name = one["metadata"]["name"]
    spec = one["spec"]
    if spec.get("type") != "ClusterIP":
        yield f"service {name} is seen outside of the cluster"
    behind = [pod for pod in pods(objects) if _selects(spec.get("selector", {}), pod)]
    if [pod.role for pod in behind] != [name]:
        yield f"service {name} leads to {behind}"
        return
    ports = _ports(behind[0])
    for port in spec["ports"]:
        if port.get("port") != ports.get(port.get("targetPort")):
            yield f"service {name}: {port} leads to none of {ports}"
        if port.get("name") != port.get("targetPort"):
            yield f"service {name}: a port's name"


def _selects(labels: dict[str, str], pod: Pod) -> bool:
    return bool(labels) and labels.items() <= pod.labels.items()


def _ports(pod: Pod) -> dict[str, int]:
    return {
        port.get("name"): port["containerPort"]
        for port in pod.spec["containers"][0].get("ports", [])
        if port.get("protocol", "TCP") == "TCP"
    }


def _selector(one: Object, there: dict[tuple[str, str], Object]) -> Iterator[str]:
    spec = one["spec"]
    labels = spec["template"]["metadata"]["labels"]
    if spec["selector"] != {"matchLabels": labels} or spec.get("replicas") != 1:
        yield f"{key(one)}: selector, or more than one on a volume"
    if one["kind"] == "StatefulSet" and ("Service", spec.get("serviceName", "")) not in there:
        yield f"{key(one)}: no service"
    if one["kind"] == "Deployment" and spec.get("strategy") != {"type": "Recreate"}:
        yield f"{key(one)}: two pods at a time cannot mount its volume"


def _budget(one: Object, objects: tuple[Object, ...]) -> Iterator[str]:
    spec = one["spec"]
    labels = spec.get("selector", {}).get("matchLabels", {})
    covered = [pod for pod in pods(objects) if _selects(labels, pod)]
    bound = {k: v for k, v in spec.items() if k != "selector"}
    if len(covered) != 1 or set(spec.get("selector", {})) != {"matchLabels"}:
        yield f"{key(one)} covers {covered}"
    # A number to keep, where nothing scales the pod; else none may be away.
    elif bound != ({"minAvailable": 1} if covered[0].is_ray else {"maxUnavailable": 0}):
        yield f"{key(one)}: {bound}"


def _used(objects: tuple[Object, ...]) -> Iterator[str]:
    """Nothing is made that nobody uses, and all that must not be evicted is kept."""
    mounted = {
        (kind, volume[field][name])
        for pod in pods(objects)
        for volume in pod.spec.get("volumes", [])
        for field, kind, name in (
            ("configMap", "ConfigMap", "name"),
            ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
        )
        if field in volume
    }
    accounts = {("ServiceAccount", pod.spec.get("serviceAccountName")) for pod in pods(objects)}
    for one in objects:
        if one["kind"] in ("ConfigMap", "PersistentVolumeClaim", "ServiceAccount"):
            if key(one) not in mounted | accounts:
                yield f"{key(one)} is used by none"
    kept = {
        tuple(sorted(one["spec"].get("selector", {}).get("matchLabels", {}).items()))
        for one in objects
        if one["kind"] == "PodDisruptionBudget"
    }
    for pod in pods(objects):
        if pod.role in ("ray-head", "mlflow", "postgres"):
            if tuple(sorted(pod.labels.items())) not in kept:
                yield f"{pod} has no disruption budget"
    for pod in pods(objects):
        if pod.role == "ray-head" and _ports(pod) != RAY_PORTS:
            yield f"{pod} has ports {_ports(pod)}"
    if not any(cluster_spec(one) for one in objects):
        yield "no cluster"


def _claims(objects: tuple[Object, ...]) -> Iterator[str]:
    for one in objects:
        claims = []
        if one["kind"] == "PersistentVolumeClaim":
            claims.append((one["metadata"]["name"], one["spec"]))
        for claim in one.get("spec", {}).get("volumeClaimTemplates", []):
            claims.append((claim["metadata"].get("name"), claim["spec"]))
            if set(claim["metadata"]) != {"name"}:
                yield f"a claim's metadata {claim['metadata']}"
        for name, spec in claims:
            if not re.fullmatch(
                r"\d+[GT]i", spec.get("resources", {}).get("requests", {}).get("storage", "")
            ):
                yield f"claim {name} asks for no size"
