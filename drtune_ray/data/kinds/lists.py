"""Lists of paths and labels: CSV, TSV and JSON lines. Paths are relative to the list."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

from drtune_ray.config.inputs import DataConfig
from drtune_ray.data.files import files_below
from drtune_ray.data.kinds.found import FoundImages
from drtune_ray.data.kinds.rows import Columns, Row, choose_columns, found_rows
from drtune_ray.data.listing import REPEATED, LeftOut
from drtune_ray.errors import ConfigError
from drtune_ray.values import printable

DELIMITED, JSON_LINES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
SUFFIXES = (*DELIMITED, *JSON_LINES)
DELIMITERS = ",;\t"


def find_list(location: str, config: DataConfig) -> FoundImages:
    """Return the images that a list names.

    Raises:
        ConfigError: If the list cannot be read, or a column is missing.
    """
    folder, _, name = location.rpartition("/")
    files = files_below(folder or "/")
    text = _text(location, files.read(name))
    is_delimited = location.lower().endswith(DELIMITED)
    records = _delimited(text, location) if is_delimited else _json_lines(text, location)
    if not records:
        raise ConfigError(f"{location} holds no rows: give a list of images and labels")
    names = list(dict.fromkeys(key for _, record in records for key in record))
    columns = choose_columns(names, config, location)
    rows, problems, left_out = _rows(records, columns, location)
    found = found_rows(location, files, rows, columns.label, skip_bad=config.skip_bad)
    found.problems = problems + found.problems
    found.left_out += left_out
    found.notes.insert(0, f"list {name}: {columns.describe()}")
    return found


def _text(location: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{location}:{line} is not UTF-8: save the list as UTF-8") from None


def _delimited(text: str, location: str) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows by their line. The header shows the delimiter, but for .tsv."""
    header = text.partition("\n")[0]
    is_tabbed = location.lower().endswith(".tsv")
    delimiter = "\t" if is_tabbed else max(DELIMITERS, key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        found = [(reader.line_num, record) for record in reader]
    except csv.Error as error:
        raise ConfigError(
            f"{location}:{reader.line_num} is not valid ({error}): correct the line"
        ) from None
    for line, record in found:
        if None in record:
            raise ConfigError(
                f"{location}:{line} has more values than the header has columns: quote values "
                f"that hold {delimiter!r}"
            )
    return found


def _json_lines(text: str, location: str) -> list[tuple[int, dict[str, Any]]]:
    if text.lstrip().startswith("["):
        return [(at, _object(r, location, at)) for at, r in enumerate(_json(text, location, 1), 1)]
    lines = enumerate(text.splitlines(), 1)
    return [
        (at, _object(_json(line, location, at), location, at)) for at, line in lines if line.strip()
    ]


def _json(text: str, location: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{location}:{line} is not JSON ({error}): correct the line") from None


def _object(value: Any, location: str, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f'{location}:{line} is not a JSON object: write {{"image": PATH, "label": CLASS}}'
        )
    return value


def _rows(
    records: Iterable[tuple[int, dict[str, Any]]], columns: Columns, location: str
) -> tuple[list[Row], list[str], list[LeftOut]]:
    """Return the rows, sentences about contradictions, and rows that repeat an earlier one."""
    first: dict[str, Row] = {}
    problems, repeated = [], []
    for line, record in records:
        place = f"{location}:{line}"
        path = record.get(columns.image)
        if not isinstance(path, str) or not path or "\0" in path:
            problems.append(f"{place} names no image in column {columns.image!r}: add its path")
            continue
        label = record.get(columns.label)
        split = record.get(columns.split) if columns.split else None
        group = record.get(columns.group) if columns.group else None
        row = Row(path, place, label, split, group)
        former = first.setdefault(path, row)
        if former is row:
            continue
        if (former.label, former.split, former.group) == (label, split, group):
            repeated.append(LeftOut(printable(place), REPEATED))
        else:
            problems.append(
                f"{place}: {printable(path)} has the label {label!r} here and {former.label!r} on "
                f"line {former.place.rpartition(':')[2]}, or other splits or groups: keep one line"
            )
    return list(first.values()), problems, repeated
