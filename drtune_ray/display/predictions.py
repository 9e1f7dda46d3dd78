"""Predictions as CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from drtune_ray.results.predict import Prediction

CSV, JSON_LINES, PARQUET = "csv", "jsonl", "parquet"
SUFFIXES = {".csv": CSV, ".jsonl": JSON_LINES, ".json": JSON_LINES, ".parquet": PARQUET}


def columns(classes: Sequence[str], top: int, *, all_classes: bool) -> list[str]:
    """Return the names of the columns of a row."""
    more = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("label", "probability")]
    each = [f"probability of {name}" for name in classes] if all_classes else []
    return ["image", "label", "probability", *more, *each]


def row(
    prediction: Prediction, classes: Sequence[str], top: int, *, all_classes: bool
) -> dict[str, Any]:
    """Return a prediction by column."""
    ranked = list(prediction.probabilities.items())[:top]
    values: list[Any] = [prediction.image]
    values += [value for pair in ranked for value in pair]
    if all_classes:
        values += [prediction.probabilities[name] for name in classes]
    return dict(zip(columns(classes, top, all_classes=all_classes), values, strict=True))


def write_csv(sink: IO[str], rows: Iterable[dict[str, Any]], names: Sequence[str]) -> None:
    """Write rows as CSV with a header; probabilities have six digits."""
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(names)
    for each in rows:
        values = (each[name] for name in names)
        writer.writerow(f"{v:.6f}" if isinstance(v, float) else v for v in values)


def write_json_lines(sink: IO[str], rows: Iterable[dict[str, Any]], names: Sequence[str]) -> None:
    """Write a JSON object a row."""
    for each in rows:
        sink.write(json.dumps(each) + "\n")


def write_parquet(sink: IO[bytes], rows: Iterable[dict[str, Any]], names: Sequence[str]) -> None:
    """Write rows as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet

    words = {name for name in names if name == "image" or name.split("_")[0] == "label"}
    fields = [(name, pa.string() if name in words else pa.float64()) for name in names]
    schema = pa.schema(fields)
    with pyarrow.parquet.ParquetWriter(sink, schema) as writer:
        for part in _parts(rows):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


WRITERS: dict[str, Callable[..., None]] = {
    CSV: write_csv,
    JSON_LINES: write_json_lines,
    PARQUET: write_parquet,
}


def _parts(rows: Iterable[dict[str, Any]], size: int = 4096) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for each in rows:
        part.append(each)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
