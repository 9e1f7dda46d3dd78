"""Write any source of images as Parquet shards, one set a split, with a manifest.

The shards are in Hugging Face's layout: `datasets` and pandas read them, and so does a study, which
keeps their splits. The same images give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.kinds.found import ImageReader
from drtune_ray.data.kinds.recognize import open_images
from drtune_ray.data.sources import GROUP, read_bytes, scan_images
from drtune_ray.data.splits import SPLIT_COLUMN, Splits, make_splits
from drtune_ray.errors import ConfigError
from drtune_ray.folders import files_as_problem

MANIFEST_NAME = "manifest.json"
SHARD_BYTES = 2**28
ROWS_PER_GROUP = 100  # images that are read at once
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Rows = list[dict[str, Any]]


@files_as_problem()
def prepare_images(config: DataConfig, out: Path) -> dict[str, Any]:
    """Write the images of a source to a new folder; return the manifest.

    Args:
        config: The source, and how it is divided.
        out: Folder that does not exist, or is empty.

    Raises:
        ConfigError: If the source is refused, or the folder is not empty.
        EnvironmentProblem: If the folder cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: give a new folder")
    splits = make_splits(scan_images(config), config)
    reader = open_images(config)
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # left by a killed command
    aside.mkdir(parents=True)
    try:
        shards = [
            {
                "file": name,
                "images": len(rows),
                "sha256": _write(aside / name, rows, splits, reader),
            }
            for name, rows in _shards(splits)
        ]
        manifest = _manifest(splits, shards)
        (aside / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _shards(splits: Splits) -> Iterator[tuple[str, Rows]]:
    """Yield name and rows of each shard; rows are ordered by content."""
    order = [("content_hash", "ascending"), ("label", "ascending"), ("path", "ascending")]
    for split in sorted(set(splits.manifest[SPLIT_COLUMN].to_pylist())):
        parts: list[Rows] = [[]]
        size = 0
        for row in splits.rows(split).sort_by(order).to_pylist():
            if parts[-1] and size + row["num_bytes"] > SHARD_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(row)
            size += row["num_bytes"]
        for at, rows in enumerate(parts):
            yield f"{split}-{at:05d}-of-{len(parts):05d}.parquet", rows


def _write(path: Path, rows: Rows, splits: Splits, reader: ImageReader) -> str:
    """Write a shard; return the SHA-256 of the file."""
    schema = _schema(splits.classes, with_groups=any(row.get(GROUP) for row in rows))
    with pq.ParquetWriter(path, schema, compression="none", write_page_checksum=True) as writer:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            part = [_row(row, reader) for row in rows[start : start + ROWS_PER_GROUP]]
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _row(row: dict[str, Any], reader: ImageReader) -> dict[str, Any]:
    name = PurePosixPath(row["path"].rpartition(":")[2]).name
    image = {"bytes": read_bytes(reader, row), "path": name}
    return {"image": image, "label": row["label"], "group": row.get(GROUP)}


def _schema(classes: Sequence[str], *, with_groups: bool) -> pa.Schema:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
    }
    columns = [("image", IMAGE), ("label", pa.int64())]
    if with_groups:
        columns.append(("group", pa.string()))
        features["group"] = {"dtype": "string", "_type": "Value"}
    about = json.dumps({"info": {"features": features}})
    return pa.schema(columns, metadata={"huggingface": about})


def _manifest(splits: Splits, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    columns = (splits.manifest[name].to_pylist() for name in (SPLIT_COLUMN, "label"))
    counts = Counter(zip(*columns, strict=True))
    names = sorted({split for split, _ in counts})
    return {
        "classes": list(splits.classes),
        "images": {
            split: {name: counts[split, label] for label, name in enumerate(splits.classes)}
            for split in names
        },
        "content": splits.content_digest(),
        "shards": list(shards),
    }
