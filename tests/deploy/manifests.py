"""Manifests as users get them: from ``kubectl kustomize`` and from ``drtune-ray deploy render``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from drtune_ray.cli.deploy import deploy

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
STUDIES = Path(__file__).parent / "studies"
OVERLAYS = ("eks", "gke", "gpu", "gpu-spot", "kind-cpu", "kueue")
KUSTOMIZED = ("base", *(f"overlays/{name}" for name in OVERLAYS))

Object = dict[str, Any]


@dataclass(frozen=True)
class Render:
    """A call of ``deploy render``."""

    study: str
    overlay: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.study} {self.overlay}"


RENDERS = (
    Render("shared-volume", "kind-cpu", ("--claim", "storage")),
    Render("servers", "gpu", ("--data-claim", "images")),
    Render("several-workers", "gpu-spot", ("--claim", "storage", "--data-claim", "images")),
    Render("shared-gpu", "kueue", ("--claim", "storage", "--worker-memory", "6")),
    Render("several-workers", "gke", ("--claim", "storage", "--data-claim", "images")),
    Render("servers", "eks", ("--data-claim", "images", "--head-memory", "16")),
)


def kubectl() -> str:
    found = shutil.which("kubectl")
    assert found, "kubectl is not installed: put it on PATH, its kustomize makes the manifests"
    return found


@cache
def kustomized(folder: str) -> tuple[Object, ...]:
    """What ``kubectl apply -k deploy/FOLDER`` would send."""
    done = subprocess.run(
        [kubectl(), "kustomize", str(DEPLOY / folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # kustomize warns there
    return tuple(yaml.load_all(done.stdout, yaml.CSafeLoader))


@cache
def rendered(render: Render) -> tuple[Object, ...]:
    """What ``drtune-ray deploy render`` writes to stdout."""
    arguments = [str(STUDIES / f"{render.study}.yaml"), "--overlay", render.overlay]
    result = CliRunner().invoke(
        deploy, ["render", *arguments, *render.options], catch_exceptions=False
    )
    assert result.exit_code == 0
    return tuple(yaml.load_all(result.stdout, yaml.CSafeLoader))


@cache
def applied(render: Render) -> tuple[Object, ...]:
    """A rendered study beside what its overlay has put into the namespace before."""
    around = [one for one in kustomized(f"overlays/{render.overlay}") if key(one) not in OWN]
    return (*around, *rendered(render))


# Of the base's own study, which a rendered one replaces.
OWN = {("RayJob", "study"), ("ConfigMap", "study-file"), ("PodDisruptionBudget", "study-head")}


def key(one: Mapping[str, Any]) -> tuple[str, str]:
    return one["kind"], one["metadata"]["name"]


@dataclass(frozen=True)
class Pod:
    """A pod that an object makes, before it is made.

    Attributes:
        owner: The object.
        template: Its metadata and spec.
        cluster: The Ray cluster's spec, of a pod that is a node of it.
    """

    owner: Object
    template: Object
    cluster: Object | None = None

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.template.get("metadata", {}).get("labels", {})

    @property
    def role(self) -> str:
        return self.labels.get("drtune-ray/role", "none")

    @property
    def is_ray(self) -> bool:
        return self.cluster is not None

    @property
    def is_autoscaled_head(self) -> bool:
        cluster = self.cluster or {}
        is_head = self.template is cluster.get("headGroupSpec", {}).get("template")
        return is_head and cluster.get("enableInTreeAutoscaling") is True

    def __str__(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata'].get('name')}, {self.role}"


def cluster_spec(one: Object) -> Object | None:
    """The spec of the Ray cluster that an object makes."""
    if one["kind"] == "RayCluster":
        return one["spec"]
    names = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    return one["spec"][names[one["kind"]]] if one["kind"] in names else None


def pods_of(one: Object) -> Iterator[Pod]:
    if one["kind"] in ("Deployment", "StatefulSet"):
        yield Pod(one, one["spec"]["template"])
    if one["kind"] == "RayJob":
        yield Pod(one, one["spec"]["submitterPodTemplate"])
    if cluster := cluster_spec(one):
        yield Pod(one, cluster["headGroupSpec"]["template"], cluster)
        for group in cluster["workerGroupSpecs"]:
            yield Pod(one, group["template"], cluster)


def pods(objects: tuple[Object, ...]) -> list[Pod]:
    return [pod for one in objects for pod in pods_of(one)]


def quantity(text: str) -> float:
    """Kubernetes' numbers: ``500m``, ``2``, ``4Gi``."""
    units = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    for unit, factor in units.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)
