"""The answers of the compared models on the test split, kept so that it is opened once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from drtune_ray.folders import atomic_write
from drtune_ray.results.comparison.result import ANSWERS_NAME

FACTS = b"drtune.comparison"
IMAGE = "content_hash"


@dataclass(frozen=True)
class StoredAnswers:
    """Answers of several models.

    Attributes:
        models: Digest of the models.
        correct: Whether each image was classified correctly, (N,) for each model.
        hashes: Hash of the content of each image.
        num_openings: Number of openings of the test split then.
        time_ms: Time of the opening, in milliseconds since 1970.
    """

    models: str
    correct: Mapping[str, NDArray[np.bool_]]
    hashes: tuple[str, ...]
    num_openings: int
    time_ms: int


def write_answers(folder: Path, found: StoredAnswers) -> None:
    """Write the answers: a row an image, a column a model."""
    table = pa.table({IMAGE: list(found.hashes), **found.correct})
    facts = {
        "models": found.models,
        "num_openings": found.num_openings,
        "time_ms": found.time_ms,
    }
    table = table.replace_schema_metadata({FACTS: json.dumps(facts)})
    atomic_write(folder / ANSWERS_NAME, partial(pq.write_table, table))


def read_answers(folder: Path) -> StoredAnswers | None:
    """Return the answers in the folder of a comparison; None if there are none to be read."""
    try:
        table = pq.read_table(folder / ANSWERS_NAME)
        facts = json.loads(table.schema.metadata[FACTS])
        correct = {name: table[name].to_numpy() for name in table.column_names if name != IMAGE}
        hashes = tuple(table[IMAGE].to_pylist())
        return StoredAnswers(correct=correct, hashes=hashes, **facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
