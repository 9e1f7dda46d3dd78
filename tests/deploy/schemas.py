"""Validators of Kubernetes' and KubeRay's schemas, made once; unknown fields are errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jsonschema
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from tests.deploy.manifests import Object, pods_of

KUBERNETES = "1.32"
KUBERAY_KINDS = ("RayJob", "RayCluster", "RayService")
Validator = jsonschema.Draft202012Validator


def schema_problems(objects: tuple[Object, ...]) -> Iterator[str]:
    for one in objects:
        yield from problems_of(one)


def problems_of(one: Object) -> Iterator[str]:
    """What the schemas say of an object, and of the pods that KubeRay would make of it."""
    validator = validator_of(str(one.get("kind")), str(one.get("apiVersion")))
    if validator is None:
        yield f"no schema of kind {one.get('kind')!r} in {one.get('apiVersion')!r}"
        return
    yield from _errors(validator, one)
    if one["kind"] in KUBERAY_KINDS and validator.is_valid(one):
        for pod in pods_of(one):
            yield from _errors(validator_of("Pod", "v1"), _as_pod(pod.template))


def _errors(validator: Validator, one: Object) -> Iterator[str]:
    for error in validator.iter_errors(one):
        yield f"{one['kind']} {'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"


def _as_pod(template: Object) -> Object:
    return {"apiVersion": "v1", "kind": "Pod", **template}


@cache
def validator_of(kind: str, version: str) -> Validator | None:
    if kind in KUBERAY_KINDS:
        return _kuberay_validator(kind) if version == "ray.io/v1" else None
    try:
        return _core_validator(kind, version)
    except FileNotFoundError:
        return None


def _kuberay_validator(kind: str) -> Validator:
    file = Path(__file__).parent / "schemas" / f"{kind.lower()}.v1.schema.json"
    return Validator(json.loads(file.read_text()))


def _core_validator(kind: str, api_version: str) -> Validator:
    """As `kubernetes_validate.validate` makes it at each call."""
    folder = f"kubernetes-json-schema/v{_schema_version()}-local-strict"
    short = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = schema_contents(f"{folder}/{kind.lower()}-{short}.json", KUBERNETES)
    definitions = schema_contents(f"{folder}/_definitions.json", KUBERNETES)
    registry = Resource.from_contents(schema) @ Registry()
    registry = Resource.from_contents(definitions) @ registry
    return Validator(schema, registry=registry)


@cache
def _schema_version() -> str:
    import kubernetes_validate

    return next(
        version
        for version in reversed(kubernetes_validate.utils.all_versions())
        if kubernetes_validate.utils.major_minor(version) == KUBERNETES
    )
