"""The file with the splits of a study's images."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from drtune_ray.errors import EnvironmentProblem, first_line
from drtune_ray.folders import atomic_write

COLUMNS = {"path", "label", "content_hash", "split"}


def write_manifest(manifest: pa.Table, path: Path) -> None:
    """Write the table of images and their splits, with checksums."""
    write = partial(pq.write_table, manifest, write_page_checksum=True)
    atomic_write(path, write, is_durable=False)


def read_manifest(path: Path) -> pa.Table:
    """Read the table of images and their splits.

    Raises:
        EnvironmentProblem: If the file is damaged.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        if missing := COLUMNS - set(table.column_names):
            raise pa.ArrowInvalid(f"it lacks {sorted(missing)}")
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise EnvironmentProblem(
            f"{path}, which holds the split of each image, is damaged ({first_line(error)}): bring "
            "it back from a backup; a study's own copy is splits.parquet in its folder"
        ) from None
    return table
