"""Parquet and Arrow shards of encoded images: Hugging Face's layout, saved datasets, and others."""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.files import Files, Stamp
from drtune_ray.data.kinds.found import FoundImages
from drtune_ray.data.kinds.rows import Columns, Row, choose_columns, found_rows, several_splits
from drtune_ray.data.listing import split_word
from drtune_ray.errors import ConfigError, first_line

PARQUET, ARROW = ".parquet", ".arrow"
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # of Hugging Face's `save_to_disk`
FEATURES_KEY = b"huggingface"
CACHE_BYTES = 2**29
FILE_ERRORS = (OSError, ValueError, pa.ArrowException)


def find_shards(
    location: str, files: Files, names: Sequence[str], config: DataConfig
) -> FoundImages:
    """Return the images of shards.

    Args:
        location: The source.
        files: Its files.
        names: Names of the shards.
        config: Settings of the columns.

    Raises:
        ConfigError: If a shard cannot be read, or the shards differ in their columns.
    """
    shards = {name: _opened(files, name) for name in sorted(names)}
    schema = next(iter(shards.values())).schema
    for name, shard in shards.items():
        if shard.schema.names != schema.names:
            raise ConfigError(
                f"{files.address(name)} has other columns than {files.address(min(shards))}: give "
                "shards of one data set"
            )
    features = _features(schema)
    classes = [name for name, f in features.items() if f.get("_type") == "ClassLabel"]
    columns = choose_columns(
        schema.names, config, location, images=_image_columns(schema, features), labels=classes
    )
    reader = ShardReader(files, columns.image)
    splits = several_splits({name: split_word(name) for name in shards})
    rows = [r for name, s in shards.items() for r in _rows(files, name, s, columns, splits[name])]
    given = features.get(columns.label, {}).get("names")
    found = found_rows(location, reader, rows, columns.label, names=given, skip_bad=config.skip_bad)
    found.notes.insert(0, _note(list(shards), columns, any(splits.values())))
    return found


def _note(names: Sequence[str], columns: Columns, has_splits: bool) -> str:
    number = "1 file" if len(names) == 1 else f"{len(names)} files"
    kind = "Parquet" if names[0].endswith(PARQUET) else "Arrow"
    by_name = ", splits from the names of the files" if has_splits else ""
    return f"{kind}, {number}: {columns.describe()}{by_name}"


class ShardReader:
    """Encoded images of shards, by ``shard:row``.

    Args:
        files: The files of the source.
        column: Column of the images: bytes, a path, or Hugging Face's struct of both.
    """

    def __init__(self, files: Files, column: str) -> None:
        self._files, self._column = files, column
        self._shards: dict[str, _Shard] = {}
        self._groups = OrderedDict[tuple[str, int], pa.ChunkedArray]()
        self._lock = threading.Lock()

    def stamp(self, path: str) -> Stamp:
        """Return the time of the shard; the size of an image is known once it is read."""
        return Stamp(None, self._files.stamp(path.rpartition(":")[0]).modified_ns)

    def read(self, path: str) -> bytes:
        """Return an encoded image."""
        name, _, row = path.rpartition(":")
        try:
            with self._lock:
                value = self._value(name, int(row))
        except (*FILE_ERRORS, IndexError) as error:
            raise OSError(0, first_line(error)) from None
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str):
            folder, slash, _ = name.rpartition("/")
            return self._files.read(f"{folder}{slash}{value}")
        if not isinstance(value, bytes):
            raise OSError(0, f"no bytes in column {self._column!r}")
        return value

    def address(self, path: str) -> str:
        """Return the shard and the row."""
        return self._files.address(path)

    def _value(self, name: str, row: int) -> Any:
        if name not in self._shards:
            self._shards[name] = _opened(self._files, name)
        group, first = self._shards[name].group_of(row)
        key = name, group
        if key not in self._groups:
            self._groups[key] = self._shards[name].column(self._column, group)
            while len(self._groups) > 1 and self._num_bytes() > CACHE_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key][row - first].as_py()

    def _num_bytes(self) -> int:
        return sum(column.nbytes for column in self._groups.values())


@dataclass(frozen=True)
class _Shard:
    """An opened shard: groups of rows that are read at once."""

    schema: pa.Schema
    starts: tuple[int, ...]  # first row of each group, and the number of rows
    source: Any

    def group_of(self, row: int) -> tuple[int, int]:
        """Return the group of a row and the group's first row."""
        if not 0 <= row < self.starts[-1]:
            raise IndexError(f"row {row} does not exist")
        group = bisect_right(self.starts, row) - 1
        return group, self.starts[group]

    def column(self, name: str, group: int) -> pa.ChunkedArray:
        """Return a column of a group."""
        if isinstance(self.source, pq.ParquetFile):
            return self.source.read_row_group(group, columns=[name])[name]
        return self.source[name]

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Return whole columns."""
        is_parquet = isinstance(self.source, pq.ParquetFile)
        table = self.source.read(columns=list(names)) if is_parquet else self.source
        return {name: table[name].to_pylist() for name in names}


def _opened(files: Files, name: str) -> _Shard:
    try:
        if name.endswith(PARQUET):
            return _parquet(pq.ParquetFile(files.open(name)))
        table = _arrow_table(files, name)
    except FILE_ERRORS as error:
        raise _unreadable_shard(files, name, error) from None
    return _Shard(table.schema, (0, len(table)), table)


def _unreadable_shard(files: Files, name: str, error: Exception) -> ConfigError:
    why = getattr(error, "strerror", None) or first_line(error)
    return ConfigError(
        f"{files.address(name)} cannot be read ({why}): replace it, or remove it from the source"
    )


def _parquet(source: pq.ParquetFile) -> _Shard:
    starts, metadata = [0], source.metadata
    for group in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return _Shard(source.schema_arrow, tuple(starts), source)


def _arrow_table(files: Files, name: str) -> pa.Table:
    """Map an Arrow file, or a stream as Hugging Face writes it."""
    try:
        return pa.ipc.open_file(files.open(name)).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(files.open(name)).read_all()


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return Hugging Face's description of the columns, empty where there is none."""
    try:
        content = json.loads((schema.metadata or {}).get(FEATURES_KEY, b"{}"))
        features = content["info"]["features"]
        return {name: f for name, f in features.items() if isinstance(f, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _image_columns(schema: pa.Schema, features: dict[str, dict[str, Any]]) -> list[str]:
    """Return the columns that hold images by their type."""
    declared = [name for name, f in features.items() if f.get("_type") == "Image"]
    if declared:
        return declared
    return [
        field.name
        for field in schema
        if pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]


def _rows(
    files: Files, name: str, shard: _Shard, columns: Columns, split: str | None
) -> Iterator[Row]:
    wanted = [c for c in (columns.label, columns.split, columns.group) if c]
    try:
        values = shard.columns(wanted)
    except FILE_ERRORS as error:
        raise _unreadable_shard(files, name, error) from None
    for at in range(shard.starts[-1]):
        yield Row(
            f"{name}:{at}",
            f"{files.address(name)}:{at}",
            values[columns.label][at],
            values[columns.split][at] if columns.split else split,
            values[columns.group][at] if columns.group else None,
        )


def saved_shards(files: Files, names: Sequence[str]) -> list[str]:
    """Return the shards of a folder that Hugging Face's `save_to_disk` wrote.

    Raises:
        ConfigError: If a file that lists them is damaged.
    """
    found = []
    for name in names:
        folder, slash, base = name.rpartition("/")
        if base == SAVED:
            try:
                listed = json.loads(files.read(name))["_data_files"]
                found += [f"{folder}{slash}{each['filename']}" for each in listed]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ConfigError(
                    f"{files.address(name)} is damaged: save the dataset again"
                ) from None
    return found
