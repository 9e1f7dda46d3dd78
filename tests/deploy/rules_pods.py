"""What keeps our pods alive and in bounds: resources, probes, volumes, environment, endings."""

from __future__ import annotations

from collections.abc import Iterator

from tests.deploy.manifests import Object, Pod, pods, quantity

ROLES = {
    "ray-head": "ray-head",
    "ray-worker": "ray-worker",
    "submitter": "ray-job-submitter",
    "mlflow": "mlflow",
    "postgres": "postgres",
}
NO_TELEMETRY = {
    "ray-head": {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"},
    "ray-worker": {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"},
    "submitter": {"RAY_USAGE_STATS_ENABLED": "0"},
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
}
# How long Ray drains its node after SIGTERM: by default, and as this variable says.
DRAIN, DEFAULT_DRAIN_SECONDS = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "30"
LEAST_DRAIN_SECONDS = 15
RAY_HEALTH = {"path": "/api/healthz", "port": 52365}


def pod_problems(objects: tuple[Object, ...]) -> Iterator[str]:
    for pod in pods(objects):
        for problem in _problems(pod):
            yield f"{pod}: {problem}"


def _problems(pod: Pod) -> Iterator[str]:
    (container,) = pod.spec["containers"]
    if ROLES.get(pod.role) != container["name"]:
        yield f"role {pod.role} with container {container['name']}"
    if pod.spec.get("serviceAccountName") != pod.role:
        yield "each role has its account"
    restart = None if pod.role in ("mlflow", "postgres") else "Never"
    if pod.spec.get("restartPolicy") != restart:
        yield "restartPolicy: KubeRay makes a new pod"
    yield from _resources(container.get("resources", {}))
    yield from _volumes(pod, container)
    yield from _environment(pod, container)
    yield from _endings(pod, container)
    if pod.role != "submitter":
        yield from _probes(pod, container)
    if pod.is_autoscaled_head:
        assert pod.cluster
        options = pod.cluster["autoscalerOptions"]
        yield from _resources(options.get("resources", {}))
        if options.get("volumeMounts") != [{"name": "tmp", "mountPath": "/tmp"}]:
            yield "the autoscaler cannot write"
        if options.get("env") != [{"name": "HOME", "value": "/tmp"}]:
            yield "the autoscaler has no home"
    evict = pod.template["metadata"].get("annotations", {})
    never = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    if evict != (never if pod.role == "ray-head" else {}):
        yield "a head is not moved to save a node"


def _resources(resources: Object) -> Iterator[str]:
    limits = resources.get("limits", {})
    if not limits or resources.get("requests") != limits:
        yield f"requests equal limits: {resources}"
    if set(limits) - {"nvidia.com/gpu"} != {"cpu", "memory"}:
        yield "cpu and memory are bounded"


def _volumes(pod: Pod, container: Object) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    claimed = pod.owner["spec"].get("volumeClaimTemplates", [])
    volumes |= {one["metadata"]["name"]: {"persistentVolumeClaim": {}} for one in claimed}
    mounts = {mount["name"]: mount for mount in container.get("volumeMounts", [])}
    if set(mounts) != set(volumes) or len(mounts) != len(container.get("volumeMounts", [])):
        yield f"volumes {sorted(volumes)} are mounted as {sorted(mounts)}"
        return
    paths = [mount["mountPath"] for mount in mounts.values()]
    if len(set(paths)) < len(paths) or "/tmp" not in paths:
        yield f"mounted at {paths}"
    for name, volume in volumes.items():
        is_fixed = "configMap" in volume or volume.get("persistentVolumeClaim", {}).get("readOnly")
        if mounts[name].get("readOnly", False) is not bool(is_fixed):
            yield f"readOnly of {name}"
        if "emptyDir" in volume and not volume["emptyDir"].get("sizeLimit"):
            yield f"{name} has no limit"
    if pod.is_ray:
        yield from _shared_memory(volumes, mounts, container)


def _shared_memory(volumes: Object, mounts: Object, container: Object) -> Iterator[str]:
    memory = quantity(container["resources"]["limits"]["memory"])
    shared = volumes.get("shm", {}).get("emptyDir", {})
    if mounts["shm"]["mountPath"] != "/dev/shm" or shared.get("medium") != "Memory":
        yield "/dev/shm"
    elif quantity(shared["sizeLimit"]) * 2 != memory:
        yield "shared memory is half of the memory"
    if mounts["storage"]["mountPath"] != "/storage":
        yield "/storage"


def _environment(pod: Pod, container: Object) -> Iterator[str]:
    variables = container.get("env", [])
    names = [variable["name"] for variable in variables]
    if len(set(names)) < len(names):
        yield "a variable twice"
    values = {variable["name"]: variable.get("value") for variable in variables}
    wanted = dict(NO_TELEMETRY.get(pod.role, {}))
    if pod.role != "postgres":
        wanted["HOME"] = "/tmp"
    if pod.role == "ray-head":
        wanted["RAY_JOB_STOP_WAIT_TIME_S"] = "30"
    for name, value in wanted.items():
        if values.get(name) != value:
            yield f"{name}={values.get(name)}"
    known = {DRAIN} | set(wanted) | {name for name, value in values.items() if value is None}
    if pod.is_ray and set(names) - known:
        yield f"unknown variables {sorted(set(names) - known)}"


def _endings(pod: Pod, container: Object) -> Iterator[str]:
    seconds = pod.spec.get("terminationGracePeriodSeconds", 0)
    if pod.role == "submitter":
        return
    if not 25 <= seconds <= 120:
        yield f"terminationGracePeriodSeconds={seconds}"
    if "lifecycle" in container:
        yield "hooks: Ray drains its node by itself"
    if pod.is_ray:
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        drain = int(values.get(DRAIN, DEFAULT_DRAIN_SECONDS))
        if not LEAST_DRAIN_SECONDS <= drain <= seconds - 10:
            yield f"{drain} s for trials that save, of {seconds}"


def _probes(pod: Pod, container: Object) -> Iterator[str]:
    kinds = ("readinessProbe", "livenessProbe")
    kinds = kinds if pod.is_ray else ("startupProbe", *kinds)
    for kind in kinds:
        probe = container.get(kind, {})
        yield from _probe(pod, kind, probe)
        if pod.is_ray and probe.get("httpGet") != RAY_HEALTH:
            yield f"{kind} asks {probe.get('httpGet')}"
        if pod.role == "mlflow" and probe.get("httpGet") != {"path": "/health", "port": "http"}:
            yield f"{kind} asks {probe.get('httpGet')}"
        if pod.role == "postgres":
            command = probe.get("exec", {}).get("command")
            if command != ["pg_isready", "--username", "postgres"]:
                yield f"{kind} runs {command}"


def _probe(pod: Pod, kind: str, probe: Object) -> Iterator[str]:
    period = probe.get("periodSeconds", 0)
    tolerated = period * probe.get("failureThreshold", 3)
    if kind == "startupProbe":
        if not 1 <= period <= 10 or not 240 <= tolerated <= 600:
            yield f"{kind}: {probe}"
        return
    if not period or not 5 <= probe.get("timeoutSeconds", 1) <= 10:
        yield f"{kind}: {probe}"
    if pod.is_ray and not 10 <= probe.get("initialDelaySeconds", 0) <= 60:
        yield f"{kind}: Ray takes a while to start"
    if pod.role == "postgres" or kind == "readinessProbe":
        least = 60 if pod.is_ray else 30
    else:  # a busy machine is not a dead one
        least = 300 if pod.is_ray else 120
    if not least <= tolerated <= 600:
        yield f"{kind}: {tolerated} s without an answer"
