"""The RayJob of `deploy/` with the patches of an overlay.

`kubectl kustomize` reads the same files: an overlay is a list of components, and each component
holds a JSON patch of the RayJob.
"""

from __future__ import annotations

import importlib.resources
from functools import cache
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

from drtune_ray.config.section import unknown_name
from drtune_ray.errors import ConfigError
from drtune_ray.values import read_yaml

KUSTOMIZATION = "kustomization.yaml"
RAYJOB = "rayjob.yaml"


@cache
def deploy_folder() -> Path:
    """Return the folder `deploy/` of the wheel or the checkout."""
    installed = Path(str(importlib.resources.files("drtune_ray") / "deploy"))
    return installed if installed.is_dir() else Path(__file__).parents[2] / "deploy"


def overlay_names() -> list[str]:
    """Return the valid values of `--overlay`."""
    return sorted(path.name for path in (deploy_folder() / "overlays").iterdir() if path.is_dir())


def base_objects() -> set[tuple[str, str]]:
    """Return kind and name of each object of the base."""
    folder = deploy_folder() / "base"
    kustomization = read_yaml(folder / KUSTOMIZATION)
    names = {("ConfigMap", made["name"]) for made in kustomization["configMapGenerator"]}
    for resource in kustomization["resources"]:
        documents = yaml.safe_load_all((folder / resource).read_text())
        names |= {(one["kind"], one["metadata"]["name"]) for one in documents}
    return names


def overlaid_rayjob(overlay: str) -> dict[str, Any]:
    """Return the base's RayJob with the patches of an overlay; suspended only for Kueue.

    Raises:
        ConfigError: If there is no such overlay.
    """
    if overlay not in overlay_names():
        raise ConfigError(unknown_name("overlay", overlay, overlay_names()))
    folder = deploy_folder() / "overlays" / overlay
    rayjob = read_yaml(deploy_folder() / "base" / RAYJOB)
    del rayjob["spec"]["suspend"]
    for component in read_yaml(folder / KUSTOMIZATION)["components"]:
        patch = folder / component / RAYJOB
        if patch.exists():
            rayjob = jsonpatch.apply_patch(rayjob, yaml.safe_load(patch.read_text()))
    return rayjob
