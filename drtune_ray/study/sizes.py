"""Sizes that a setting asks for and this machine does not have."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from drtune_ray.config.trial import TrialConfig
from drtune_ray.training.frozen_features import features_size

BYTES_PER_VALUE = 4  # float32, in which images are normalised
GIB = 2**30


def check_feature_table(
    config: TrialConfig, num_train: int, num_features: int, storage: Path
) -> list[str]:
    """Return a sentence if the disk cannot hold the frozen features of all views.

    Args:
        config: Configuration of the trial.
        num_train: N, number of training images.
        num_features: D, width of the encoder's features.
        storage: Folder that receives the tables.
    """
    per_view = features_size(num_train, num_features)
    there = next(path for path in (storage, *storage.parents) if path.exists())
    free = shutil.disk_usage(there).free
    views = config.data.views
    if views * per_view <= free:
        return []
    return [
        f"data.views={views} takes {views * per_view / GIB:.1f} GiB for the frozen features of "
        f"{num_train} images, but {there} has {free / GIB:.1f} GiB free: set data.views to at most "
        f"{free // per_view}"
    ]


def check_batch(config: TrialConfig) -> list[str]:
    """Return a sentence if the memory cannot hold a batch of images."""
    size, batch = config.data.image_size, config.training.batch_size
    needed = batch * 3 * size * size * BYTES_PER_VALUE
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= memory:
        return []
    return [
        f"data.image_size={size} takes {needed / GIB:.1f} GiB for a batch of {batch} images, but "
        f"this machine has {memory / GIB:.1f} GiB of memory: set data.image_size or "
        "training.batch_size lower"
    ]
