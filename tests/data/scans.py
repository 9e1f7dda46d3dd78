"""Scans of folders and other sources, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.sources import ScannedImages, scan_images
from drtune_ray.data.splits import Splits, make_splits


def scan_folder(root: Path | str, known: pa.Table | None = None, **settings: Any) -> ScannedImages:
    return scan_images(DataConfig(train=str(root), **settings), known)


def splits_of(root: Path | str, former: pa.Table | None = None, **settings: Any) -> Splits:
    config = DataConfig(train=str(root), **settings)
    return make_splits(scan_images(config), config, former)
