"""The tables of a study, read by pandas, polars and DuckDB with the documented columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas
import polars
import pytest

from drtune_ray.results.epochs import write_epochs
from drtune_ray.results.trials import summaries, write_trials
from drtune_ray.storage.record import EPOCHS_NAME, TRIALS_NAME
from tests.results.made_studies import MadeStudy, made_study

PAGE = Path(__file__).parents[2] / "docs" / "tables.md"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeStudy:
    study = made_study(tmp_path_factory.mktemp("tables") / "studies" / "flowers", 9)
    frozen = study.study.get_trials(deepcopy=False)
    write_trials(summaries(frozen), study.folder / TRIALS_NAME)
    write_epochs(frozen, study.spool.events.events(), study.folder / EPOCHS_NAME)
    return study


def with_pandas(path: Path) -> Rows:
    rows: Rows = pandas.read_parquet(path).to_dict("records")
    return rows


def with_polars(path: Path) -> Rows:
    return polars.read_parquet(path).to_dicts()


def with_duckdb(path: Path) -> Rows:
    found = duckdb.execute("SELECT * FROM read_parquet(?)", [str(path)])
    names = [column[0] for column in found.description or ()]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


READERS: list[Callable[[Path], Rows]] = [with_pandas, with_polars, with_duckdb]


def documented(name: str) -> set[str]:
    """The columns that docs/tables.md lists for a table, without the examples of settings."""
    _, _, rest = PAGE.read_text().partition(f"## {name}")
    lines = re.findall(r"^\| (`.*?) \|", rest.partition("\n## ")[0], re.M)
    return {column for line in lines for column in re.findall(r"`([\w.]+)`", line)}


@pytest.mark.parametrize("read", READERS)
def test_trials__one_row_each_with_the_documented_columns(
    made: MadeStudy, read: Callable[[Path], Rows]
) -> None:
    rows = read(made.folder / TRIALS_NAME)
    assert [row["number"] for row in rows] == list(range(9))
    columns = documented(TRIALS_NAME)
    assert {"number", "state", "optim.backbone_lr", "config"} <= columns <= set(rows[0])
    known = made.study.get_trials(deepcopy=False)
    assert [row["state"] for row in rows] == [trial.state.name for trial in known]
    assert [row["best_val_accuracy"] for row in rows] == [
        max(trial.intermediate_values.values()) for trial in known
    ]
    assert rows[3]["optim.backbone_lr"] == known[3].params["optim.backbone_lr"]
    assert isinstance(rows[3]["method.calibration.rotation"], bool)


@pytest.mark.parametrize("read", READERS)
def test_epochs__one_row_each_with_the_documented_columns(
    made: MadeStudy, read: Callable[[Path], Rows]
) -> None:
    rows = read(made.folder / EPOCHS_NAME)
    known = made.study.get_trials(deepcopy=False)
    assert [(row["number"], row["epoch"]) for row in rows] == [
        (trial.number, epoch) for trial in known for epoch in sorted(trial.intermediate_values)
    ]
    assert documented(EPOCHS_NAME) - {"loss", "cross_entropy"} <= set(rows[0])
    first = rows[0]
    assert first["best_val_accuracy"] == known[0].intermediate_values[1]
    assert first["time"].tzinfo is not None  # UTC, as the page says
