"""What KubeRay's webhook and controllers refuse and no schema says, and how our clusters are set.

After `ValidateRayJobSpec`, `ValidateRayClusterSpec` and their helpers in KubeRay's
ray-operator/controllers/ray/utils/validation.go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from tests.deploy.manifests import Object, cluster_spec, pods_of

LIMITS = {"RayJob": 47, "RayCluster": 53}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
GPU = "nvidia.com/gpu"


def kuberay_problems(objects: tuple[Object, ...]) -> Iterator[str]:
    for one in objects:
        if one["kind"] not in LIMITS:
            continue
        yield from _name(one)
        if one["kind"] == "RayJob":
            yield from refused_jobs(one["spec"])
            yield from our_jobs(one)
        elif one["spec"].get("suspend") is not True:
            yield "a cluster for work by hand is suspended until it is woken"
        cluster = cluster_spec(one)
        assert cluster
        yield from refused_clusters(cluster)
        yield from our_clusters(cluster)


def _name(one: Object) -> Iterator[str]:
    name = one["metadata"].get("name", "")
    if len(name) > LIMITS[one["kind"]] or not DNS_1035.fullmatch(name):
        yield f"{one['kind']} name {name!r} is not a DNS-1035 label of {LIMITS[one['kind']]}"


# ---- what KubeRay refuses


def refused_jobs(spec: Object) -> Iterator[str]:
    is_shut_down = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("suspend") and not is_shut_down:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished < 0"
    if spec.get("ttlSecondsAfterFinished", 0) and not is_shut_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield "suspend with clusterSelector"
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        yield "one of rayClusterSpec and clusterSelector must be there"
    if spec.get("activeDeadlineSeconds", 1) <= 0 or spec.get("backoffLimit", 0) < 0:
        yield "activeDeadlineSeconds or backoffLimit is not positive"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"
    yield from _deletion(spec, is_shut_down)
    yield from _submission(spec)


def _deletion(spec: Object, is_shut_down: bool) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules") or []
    legacy = [strategy.get("onSuccess"), strategy.get("onFailure")]
    if rules and is_shut_down:
        yield "deletionRules with shutdownAfterJobFinishes"
    if rules and any(legacy):
        yield "deletionRules with onSuccess or onFailure"
    if not rules and not all(legacy):
        yield "deletionStrategy needs deletionRules, or onSuccess and onFailure"
    autoscaled = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    policies = [rule["policy"] for rule in rules]
    if "DeleteWorkers" in policies and autoscaled:
        yield "DeleteWorkers with an autoscaler"
    pairs = [(rule["policy"], str(rule["condition"].get("jobStatus"))) for rule in rules]
    if len(set(pairs)) < len(pairs):
        yield "a deletion rule twice"


def _submission(spec: Object) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    cluster = spec.get("rayClusterSpec") or {}
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "backoffLimit in InteractiveMode"
    if mode == "SidecarMode":
        if spec.get("submitterPodTemplate") or spec.get("submitterConfig"):
            yield "a submitter's template in SidecarMode"
        if spec.get("clusterSelector"):
            yield "clusterSelector in SidecarMode"
        if _restart_policy(cluster["headGroupSpec"]) not in (None, "Never"):
            yield "restartPolicy of the head in SidecarMode"


def refused_clusters(cluster: Object) -> Iterator[str]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        params = group.get("rayStartParams", {})
        if group.get("resources") and any(params.get(name) for name in RESOURCE_PARAMS):
            yield "resources both in the group and in rayStartParams"
        if "labels" in params:
            yield "labels in rayStartParams"
        if not group["template"]["spec"].get("containers"):
            yield "a group without a container"
    yield from _autoscaling(cluster, groups)
    if (cluster.get("authOptions") or {}).get("mode") == "token":
        version = cluster.get("rayVersion", "0")
        if not re.fullmatch(r"\d+\.\d+\.\d+", version) or _numbers(version) < (2, 52):
            yield f"authOptions needs rayVersion from 2.52, but it is {version}"


def _autoscaling(cluster: Object, groups: list[Object]) -> Iterator[str]:
    head = groups[0]["template"]["spec"]["containers"][0]
    names = [variable.get("name") for variable in head.get("env", [])]
    is_on = cluster.get("enableInTreeAutoscaling", False)
    options = cluster.get("autoscalerOptions") or {}
    if "RAY_enable_autoscaler_v2" in names and (not is_on or "version" in options):
        yield "RAY_enable_autoscaler_v2 in the head's environment"
    if not is_on:
        return
    if options.get("version") == "v2":
        for group in groups:
            if _restart_policy(group) not in (None, "Never"):
                yield "restartPolicy with autoscaler v2"
    if any(group.get("suspend") for group in groups[1:]):
        yield "a suspended group with an autoscaler"


def _restart_policy(group: Object) -> str | None:
    return group["template"]["spec"].get("restartPolicy")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


# ---- how ours are set


def our_jobs(one: Object) -> Iterator[str]:
    spec = one["spec"]
    if spec.get("submissionMode") != "K8sJobMode":
        yield "submissionMode: the submitter's pod must be ours, KubeRay's own is not restricted"
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield "a cluster stays after its study"
    if not 60 <= spec.get("ttlSecondsAfterFinished", 0) <= 3600:
        yield "ttlSecondsAfterFinished leaves no time to look, or costs an idle cluster"
    if not 0 < spec.get("preRunningDeadlineSeconds", 0) < spec.get("activeDeadlineSeconds", 0):
        yield "deadlines"
    if not spec.get("backoffLimit") or not (spec.get("submitterConfig") or {}).get("backoffLimit"):
        yield "no second try"
    labels = one["metadata"].get("labels", {})
    if "kueue.x-k8s.io/queue-name" in labels:
        if spec.get("suspend") is not True or spec["rayClusterSpec"]["enableInTreeAutoscaling"]:
            yield "Kueue wakes a suspended job whose number of workers is fixed"


def our_clusters(cluster: Object) -> Iterator[str]:
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield "no token"
    if head.get("serviceType") != "ClusterIP":
        yield "the head's service must be seen in the cluster only"
    if head["rayStartParams"] != {"dashboard-host": "0.0.0.0"}:
        yield "the submitter does not reach the dashboard"
    yield from _declared_once(head, workers)
    is_on = cluster.get("enableInTreeAutoscaling")
    if not isinstance(is_on, bool) or is_on != ("autoscalerOptions" in cluster):
        yield "enableInTreeAutoscaling and autoscalerOptions"
    names = [group["groupName"] for group in workers]
    if len(set(names)) < len(names) or not set(names) <= {"cpu", "gpu"}:
        yield f"groups {names}"
    for group in workers:
        yield from _group(group, is_on is True)
    if is_on:
        yield from _autoscaler(cluster["autoscalerOptions"])


def _declared_once(head: Object, workers: list[Object]) -> Iterator[str]:
    resources = head.get("resources", {})
    if set(resources) != {"CPU", "trial_driver"} or resources["CPU"] != "0":
        yield "the head has no CPU for trials and says how many trials it drives"
    elif not re.fullmatch("[1-9][0-9]*", resources["trial_driver"]):
        yield "trial_driver"
    if any(group.get("resources") for group in workers):
        yield "resources of workers follow from their limits"


def _group(group: Object, is_autoscaled: bool) -> Iterator[str]:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    if (group["groupName"] == "gpu") != (GPU in limits):
        yield f"group {group['groupName']} has {limits}"
    if group.get("rayStartParams") != {}:
        yield "rayStartParams of workers follow from their limits"
    least, now, most = (group.get(f"{name}eplicas") for name in ("minR", "r", "maxR"))
    if None in (least, now, most) or not 0 <= least <= now <= most or most < 1:
        yield f"replicas {least} <= {now} <= {most}"
    elif is_autoscaled and (least, now) != (0, 0):
        yield "workers that nobody waits for"
    elif not is_autoscaled and least != most:
        yield "a range without an autoscaler"
    tolerated = [one.get("key") for one in group["template"]["spec"].get("tolerations", [])]
    if (GPU in tolerated) != (GPU in limits):
        yield "nodes with GPUs are tainted so that only pods with GPUs come there"


def _autoscaler(options: Object) -> Iterator[str]:
    if options.get("version") != "v2" or options.get("upscalingMode") != "Default":
        yield "autoscaler v2"
    if not 60 <= options.get("idleTimeoutSeconds", 0) <= 1800:
        yield "idleTimeoutSeconds"
    if options.get("imagePullPolicy") != "IfNotPresent":
        yield "imagePullPolicy of the autoscaler"


def job_pods_run_once(one: Object) -> bool:
    """Whether no pod of Ray restarts in place: KubeRay makes a new one, whose disk is empty."""
    return all(pod.spec.get("restartPolicy") == "Never" for pod in pods_of(one))
