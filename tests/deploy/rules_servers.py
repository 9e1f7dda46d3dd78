"""What the pods of MLflow, PostgreSQL and the study are told fits what the programs take."""

from __future__ import annotations

import configparser
import shlex
from collections.abc import Iterator
from functools import cache

import yaml

from drtune_ray.config.study import StudyConfig
from drtune_ray.execution.capacity import trial_demand
from drtune_ray.server_uri import names_in
from tests.deploy.manifests import Object, Pod, key, pods

AUTH_KEYS = {
    "default_permission": "NO_PERMISSIONS",
    "database_uri": "sqlite:////data/basic_auth.db",
    "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    "grant_default_workspace_access": "false",
}
MLFLOW_ENV = {
    "HOME",
    "DATABASE_PASSWORD",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_AUTH_ADMIN_USERNAME",
    "MLFLOW_AUTH_CONFIG_PATH",
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION",
}
POSTGRES_ENV = {
    "POSTGRES_USER": "postgres",
    "PGDATA": "/var/lib/postgresql/data/pgdata",
    "POSTGRES_PASSWORD": "superuser",
    "STUDY_PASSWORD": "study",
    "MLFLOW_PASSWORD": "mlflow",
}
POSTGRES_PATHS = {
    "data": "/var/lib/postgresql/data",
    "init": "/docker-entrypoint-initdb.d",
    "run": "/var/run/postgresql",
    "tmp": "/tmp",
}


def server_problems(objects: tuple[Object, ...]) -> Iterator[str]:
    configs = {
        one["metadata"]["name"]: one.get("data", {})
        for one in objects
        if one["kind"] == "ConfigMap"
    }
    namespace = next(one["metadata"]["name"] for one in objects if one["kind"] == "Namespace")
    for pod in pods(objects):
        if pod.role == "mlflow":
            yield from _mlflow(pod, namespace, configs.get("mlflow-auth", {}))
        if pod.role == "postgres":
            yield from _postgres(pod, configs.get("postgres-init", {}))
    for one in objects:
        if one["kind"] == "RayJob":
            yield from _study(one, configs.get(f"{one['metadata']['name']}-file", {}))


@cache
def mlflow_options() -> set[str]:
    from mlflow.cli import server

    return {name for option in server.params for name in option.opts}


def _mlflow(pod: Pod, namespace: str, auth: dict[str, str]) -> Iterator[str]:
    (container,) = pod.spec["containers"]
    options = dict(argument.split("=", 1) for argument in container["args"] if "=" in argument)
    if container["command"] != ["mlflow", "server"] or set(options) - mlflow_options():
        yield f"mlflow server does not take {container['command']} {container['args']}"
    names = ("mlflow", f"mlflow.{namespace}", f"mlflow.{namespace}.svc")
    names += (f"mlflow.{namespace}.svc.cluster.local", "localhost", "127.0.0.1")
    expected = {
        "--host": "0.0.0.0",
        "--port": "5000",
        "--workers": "2",
        "--app-name": "basic-auth",
        "--allowed-hosts": ",".join(f"{name}:5000" for name in names),
        "--artifacts-destination": "/data/artifacts",
    }
    if options != expected or len(container["args"]) != len(options):
        yield f"mlflow server with {options}"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    if mounts != {"data": "/data", "auth": "/etc/mlflow", "tmp": "/tmp"}:
        yield f"mounts {mounts}"
    yield from _mlflow_environment(container, auth)


def _mlflow_environment(container: Object, auth: dict[str, str]) -> Iterator[str]:
    variables = {one["name"]: one.get("value") for one in container["env"]}
    if set(variables) != MLFLOW_ENV:
        yield f"environment {sorted(variables)}"
        return
    (name,) = auth or [""]
    if variables["MLFLOW_AUTH_CONFIG_PATH"] != f"/etc/mlflow/{name}":
        yield "the file of accounts"
    address = "postgresql+psycopg://mlflow:$(DATABASE_PASSWORD)@postgres:5432/mlflow"
    if variables["MLFLOW_BACKEND_STORE_URI"] != address:
        yield "the address of the database"
    order = list(variables)
    if order.index("DATABASE_PASSWORD") > order.index("MLFLOW_BACKEND_STORE_URI"):
        yield "Kubernetes puts in what was named before only"
    secrets = {
        one["name"]: one["valueFrom"]["secretKeyRef"]["key"]
        for one in container["env"]
        if "valueFrom" in one
    }
    if secrets != {
        "DATABASE_PASSWORD": "mlflow",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "admin-password",
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin-username",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "flask-secret-key",
    }:
        yield f"secrets {secrets}"
    parser = configparser.ConfigParser()
    parser.read_string(auth.get(name, ""))
    if not parser.has_section("mlflow") or dict(parser["mlflow"]) != AUTH_KEYS:
        yield "the settings of accounts"


def _postgres(pod: Pod, init: dict[str, str]) -> Iterator[str]:
    (container,) = pod.spec["containers"]
    variables = {
        one["name"]: one.get("value") or one.get("valueFrom", {}).get("secretKeyRef", {}).get("key")
        for one in container["env"]
    }
    if variables != POSTGRES_ENV:
        yield f"environment {variables}"
    if {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} != POSTGRES_PATHS:
        yield "mounts"
    # The image runs what ends in .sh; test_servers.py runs the script.
    if [name.endswith(".sh") and text[:2] == "#!" for name, text in init.items()] != [True]:
        yield "the script of accounts"


def _study(one: Object, files: dict[str, str]) -> Iterator[str]:
    """The job runs the file that is mounted, and its cluster holds what the file asks for."""
    command = shlex.split(one["spec"].get("entrypoint", ""))
    head = next(pod for pod in pods((one,)) if pod.role == "ray-head")
    mounts = {
        mount["name"]: mount["mountPath"] for mount in head.spec["containers"][0]["volumeMounts"]
    }
    named = [word for word in command if word.endswith(".yaml")]
    if command[:2] != ["drtune-ray", "tune"] or named != [
        f"{mounts.get('study')}/{n}" for n in files
    ]:
        yield f"{command} with {sorted(files)}"
        return
    config = StudyConfig.from_mapping(yaml.safe_load(files["study.yaml"]))
    yield from _room(one, config)
    given = {variable["name"] for variable in head.spec["containers"][0]["env"]}
    addresses = [config.optuna_storage, config.artifacts, config.tracking.uri]
    needed = {name for uri in addresses for name in names_in(uri or "")}
    if config.tracking.uri:
        needed |= {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
    if needed - given:
        yield f"the study names {sorted(needed - given)}"


def _room(one: Object, config: StudyConfig) -> Iterator[str]:
    cluster = one["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    trials = int(cluster["headGroupSpec"]["resources"]["trial_driver"])
    if trials != (config.resources.trials_at_a_time or 2):
        yield f"{key(one)} drives {trials} trials"
    demand = trial_demand(config.trial.training, config.resources)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits.get("nvidia.com/gpu", 0)) * group["maxReplicas"]
    cpus = int(limits["cpu"]) * group["maxReplicas"]
    workers = trials * demand.num_workers
    if (group["groupName"] == "gpu") != (demand.num_gpus > 0):
        yield f"{key(one)}: workers of group {group['groupName']} for {demand}"
    if cpus < workers * demand.num_cpus or (demand.num_gpus and gpus < workers * demand.num_gpus):
        yield f"{key(one)} has {cpus} CPUs and {gpus} GPUs for {trials} trials of {demand}"
