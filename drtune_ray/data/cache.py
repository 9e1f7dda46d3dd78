"""Memory-mapped Arrow tables that all trials of a node share: their content and their names.

`images-*.arrow` holds the encoded images of training and validation (never of test),
`views-*.arrow` their pixels view by view if these fit under the limit, `features-*.arrow` the
frozen encoder's features. Each name contains a hash of everything that decides the content.
`TableStore` publishes a file under its name only when it is complete.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from drtune_ray.data.kinds.found import ImageReader
from drtune_ray.data.pixels import as_eight_bits, decode
from drtune_ray.data.sources import FLOAT_PEAK, INTEGER_PEAK, read_bytes
from drtune_ray.data.splits import TRAIN, VALIDATION, Splits
from drtune_ray.data.views import Pixels, ViewMaker
from drtune_ray.values import digest

ROWS_PER_BATCH = 256
# Increment when the same inputs are written as other bytes or in another order.
TABLE_VERSION = 1


def table_name(kind: str, *decided_by: Any, suffix: str = ".arrow") -> str:
    """Return the file name of a table.

    Args:
        kind: Kind of content, such as ``images``.
        decided_by: Plain values that decide the content, all of them.
        suffix: File suffix of the format.
    """
    return f"{kind}-{digest(TABLE_VERSION, *decided_by)}{suffix}"


class ImageRows:
    """Images of one split: labels in memory, encoded bytes mapped from disk.

    Args:
        table: Columns ``image``, ``label`` and ``content_hash``.
    """

    def __init__(self, table: pa.Table) -> None:
        self.labels: NDArray[np.int64] = table["label"].to_numpy().astype(np.int64)
        self._images = table["image"]
        self._hashes: list[str] = table["content_hash"].to_pylist()

    def __len__(self) -> int:
        return len(self.labels)

    def training_view(self, maker: ViewMaker, row: int, view: int) -> Pixels:
        """Return the pixels of view `view` of image `row`, (3, S, S)."""
        image = decode(self._images[row].as_py())
        return maker.training_view(image, self._hashes[row], view)

    def evaluation_view(self, maker: ViewMaker, row: int) -> Pixels:
        """Return the pixels of the evaluation view of image `row`, (3, S, S)."""
        return maker.evaluation_view(decode(self._images[row].as_py()))


def write_images(splits: Splits, root: Path | ImageReader, path: Path) -> None:
    """Write the encoded images of training and validation, those of more than 8 bits as 8 bits.

    Raises:
        ConfigError: If a file is missing or changed since the scan.
    """
    # Training rows first, each split ordered by content hash, so that the order of rows does not
    # depend on file names.
    rows = [
        row
        for split in (TRAIN, VALIDATION)
        for row in splits.rows(split).sort_by([("content_hash", "ascending")]).to_pylist()
    ]
    schema = pa.schema(
        [
            ("image", pa.binary()),
            ("label", pa.int32()),
            ("content_hash", pa.string()),
            ("split", pa.string()),
        ]
    )

    whites = splits.whites

    def encoded(row: dict[str, Any]) -> bytes:
        content = read_bytes(root, row)
        is_deep = row.get(INTEGER_PEAK) is not None or row.get(FLOAT_PEAK) is not None
        return as_eight_bits(content, whites) if is_deep else content

    def batches() -> Iterable[pa.RecordBatch]:
        for start in range(0, len(rows), ROWS_PER_BATCH):
            part = [
                {**{name: row[name] for name in schema.names if name != "image"}}
                | {"image": encoded(row)}
                for row in rows[start : start + ROWS_PER_BATCH]
            ]
            yield pa.RecordBatch.from_pylist(part, schema=schema)

    write_table(path, schema, batches())


def read_images(path: Path) -> tuple[ImageRows, ImageRows]:
    """Return the (training, validation) rows of a file written by :func:`write_images`."""
    table = read_table(path)
    # Training rows come first. Slices leave the images on disk; a filter would copy them.
    num_train = table["split"].to_pylist().count(TRAIN)
    return ImageRows(table.slice(0, num_train)), ImageRows(table.slice(num_train))


def write_array(path: Path, blocks: Iterable[NDArray[Any]]) -> None:
    """Write blocks of equal row shape, (rows, ...), concatenated along the rows.

    Raises:
        ValueError: If there is no block.
    """
    iterator = iter(blocks)
    first = next(iterator, None)
    if first is None:
        raise ValueError("write_array needs at least one block")
    width = int(np.prod(first.shape[1:]))
    schema = pa.schema(
        [("row", pa.list_(pa.from_numpy_dtype(first.dtype), width))],
        metadata={"shape": ",".join(map(str, first.shape[1:]))},
    )

    def batches() -> Iterable[pa.RecordBatch]:
        for block in (first, *iterator):
            values = pa.array(np.ascontiguousarray(block).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(values, width)
            yield pa.RecordBatch.from_arrays([column], schema=schema)

    write_table(path, schema, batches())


class MappedArray:
    """Rows of a file written by :func:`write_array`, mapped from disk."""

    def __init__(self, path: Path) -> None:
        table = read_table(path)
        shape = [int(n) for n in table.schema.metadata[b"shape"].decode().split(",")]
        self._chunks = [
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, *shape)
            for chunk in table["row"].chunks
        ]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._chunks])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> NDArray[Any]:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        picked: NDArray[Any] = self._chunks[chunk][row - int(self._starts[chunk])]
        return picked

    def take(self, rows: Iterable[int]) -> NDArray[Any]:
        """Return copies of rows, (rows, ...)."""
        return np.stack([self[row] for row in rows])


def write_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an Arrow file batch by batch."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_table(path: Path) -> pa.Table:
    """Map an Arrow file into memory without a copy."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
