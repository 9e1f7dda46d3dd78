"""The prepared tables of a study: which ones its trials read, and how they are built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

import torch

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.trial import TABLES_PATHS, TrialConfig
from drtune_ray.data.cache import table_name, write_images
from drtune_ray.data.dataset import Tables
from drtune_ray.data.kinds.recognize import open_images
from drtune_ray.data.splits import Splits, write_manifest
from drtune_ray.data.table_store import TableStore
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.execution.capacity import Capacity
from drtune_ray.space.points import combinations, needed_for
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.study.inputs import StudyInputs, manifest_path
from drtune_ray.training.backbones import Backbone
from drtune_ray.training.frozen_features import prepare_tables
from drtune_ray.values import flattened

MAX_VARIANTS = 16


def prepare(checked: StudyInputs, config: TrialConfig, store: TableStore, device: str) -> Tables:
    """Write the files that trials share: manifest, images, weights, views and frozen features.

    Args:
        checked: Inputs from `check_inputs`.
        config: One of the trials that read these tables.
        store: Table store; sound tables that exist are reused.
        device: Device of the frozen encoder.
    """
    manifest = manifest_path(config.data, store.storage)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(checked.splits.manifest, manifest)
    tables = build_tables(checked, config, store, device)
    store.keep_limit()
    return tables


def build_tables(
    checked: StudyInputs, config: TrialConfig, store: TableStore, device: str
) -> Tables:
    """Build the tables alone; see `prepare`."""
    backbone = checked.encoder_of(config)
    images = store.table(
        images_name(checked.splits),
        lambda path: write_images(checked.splits, open_images(config.data), path),
    )
    backbone_file = store.table(backbone_name(backbone), backbone.write)
    return prepare_tables(store, config.data, checked.splits.classes, images, backbone_file, device)


def images_name(splits: Splits) -> str:
    """Return the file name of the table of encoded images."""
    return table_name("images", splits.content_digest())


def backbone_name(backbone: Backbone) -> str:
    """Return the file name of a pretrained encoder among the tables."""
    about = (backbone.digest, backbone.image_size, asdict(backbone.normalization))
    return table_name("backbone", *about, suffix=".safetensors")


def prepare_all(
    checked: StudyInputs, configs: Iterable[TrialConfig], store: TableStore, device: str
) -> dict[str, Tables]:
    """Prepare the tables of several trials; return them by `TrialConfig.tables_key`."""
    by_key = {config.tables_key: config for config in configs}
    return {key: prepare(checked, config, store, device) for key, config in by_key.items()}


def preparing_device(resources: ResourcesConfig, capacity: Capacity) -> tuple[str, tuple[str, ...]]:
    """Return the device for the frozen features, and sentences about it.

    Raises:
        EnvironmentProblem: If workers are given GPUs that torch cannot use.
    """
    if not resources.worker_gpus(1):
        return "cpu", ()
    if torch.cuda.is_available():
        return "cuda", ()
    if capacity.is_local:
        raise EnvironmentProblem(
            "trials ask for GPUs but torch has no CUDA device here: set "
            "resources.gpus_per_worker=0 or install torch for CUDA"
        )
    note = "this machine has no GPU and computes the frozen features on its CPUs, once"
    return "cpu", (note,)


def table_variants(space: SearchSpace, base: TrialConfig) -> tuple[TrialConfig, ...]:
    """Return one configuration for each kind of tables, the base's first.

    Args:
        space: Search space, clamped to the images.
        base: The configuration that the space varies.

    Raises:
        ConfigError: If there are too many to prepare.
    """
    found = {base.tables_key: base}
    needed = needed_for(space.parameters, TABLES_PATHS)
    for point in combinations(needed, flattened(base.to_mapping()) | dict(space.facts)):
        config = base.with_values(
            {path: value for path, value in point.taken.items() if path in TABLES_PATHS}
        )
        found.setdefault(config.tables_key, config)
        if len(found) > MAX_VARIANTS:
            raise ConfigError(
                f"the search space asks for more than {MAX_VARIANTS} kinds of prepared images and "
                "features, each of which is computed before the first trial: give "
                f"{[p.path for p in needed]} fewer values"
            )
    return tuple(found.values())
