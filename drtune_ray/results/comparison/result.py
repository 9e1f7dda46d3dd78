"""The result of a comparison: what lies in its folder, and how it is read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drtune_ray.folders import LocalFolder, atomic_write
from drtune_ray.results.comparison.compared import Compared
from drtune_ray.results.comparison.words import conclusion, gradient_share, sentence

RESULT_NAME, SEEDS_NAME = "comparison.json", "seeds.parquet"
ANSWERS_NAME, PAGE_NAME = "answers.parquet", "comparison.html"


@dataclass(frozen=True)
class MethodRuns:
    """Search and final runs of a method.

    Attributes:
        method: `method.name`.
        study: Folder of its study.
        searched: Paths of the settings that its search varied.
        settings: Searched settings of the chosen configuration, with its values.
        num_trials: Trials of the search.
        search_epochs: Epochs that they trained together.
        search_seconds: Seconds that they took together.
        epoch_seconds: Seconds of an epoch of the final runs, saving included.
        seeds: Random seed of each final run.
        val_values: Best value of the metric that chose, of each final run.
        runs: Number of each final run's trial in its study.
        share: Share of the training images that it got.
        dr_gradient_share: Share of distribution regularization (DR) in the head's gradient, median
            over the epochs of the final runs; None without DR.
    """

    method: str
    study: str
    searched: tuple[str, ...]
    settings: dict[str, Any]
    num_trials: int
    search_epochs: int
    search_seconds: float
    epoch_seconds: float
    seeds: tuple[int, ...]
    val_values: tuple[float, ...]
    runs: tuple[int, ...]
    share: float = 1.0
    dr_gradient_share: float | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> MethodRuns:
        """Return the runs of `asdict` after JSON."""
        known: dict[str, Any] = dict(values)
        known |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**known)


@dataclass(frozen=True)
class ComparisonResult:
    """Result of a comparison.

    Attributes:
        name: Name of the comparison.
        folder: Its folder.
        models: Digest of the models whose answers were compared.
        methods: Search and final runs of each method, by its name in the comparison.
        compared: Accuracies and paired differences on the test split.
        num_openings: Number of openings of the test split, this one included.
        time_ms: Time of the opening, in milliseconds since 1970.
        was_done: Whether nothing was left to run.
        num_unsent: Number of events that the tracking server has not received yet.
    """

    name: str
    folder: Path
    models: str
    methods: dict[str, MethodRuns]
    compared: Compared
    num_openings: int
    time_ms: int
    was_done: bool = False
    num_unsent: int = 0

    @property
    def conclusion(self) -> str:
        """Answer to whether another method is better than the baseline."""
        return conclusion(self.compared)

    @property
    def sentences(self) -> dict[str, str]:
        """Verdict on each method but the baseline."""
        return {name: sentence(name, self.compared) for name in self.compared.differences}

    @property
    def gradient_shares(self) -> list[str]:
        """How much of the head's gradient is DR, of each method that has it."""
        shares = {name: runs.dr_gradient_share for name, runs in self.methods.items()}
        return [gradient_share(name, x) for name, x in shares.items() if x is not None]

    def to_mapping(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "name": self.name,
            "models": self.models,
            "conclusion": self.conclusion,
            "sentences": self.sentences,
            "methods": {name: asdict(runs) for name, runs in self.methods.items()},
            "compared": self.compared.to_mapping(),
            "num_openings": self.num_openings,
            "time_ms": self.time_ms,
        }

    def write(self) -> None:
        """Write the table of the seeds, and last the result."""
        write = partial(pq.write_table, self.seeds_table())
        atomic_write(self.folder / SEEDS_NAME, write, is_durable=False)
        content = json.dumps(self.to_mapping(), indent=1).encode()
        LocalFolder(self.folder).write(RESULT_NAME, content)

    def seeds_table(self) -> pa.Table:
        """Return one row a method and seed: its trial, validation value and test accuracy."""
        rows = [
            {
                "name": name,
                "method": runs.method,
                "seed": seed,
                "trial": trial,
                "val_value": value,
                "test_accuracy": accuracy,
            }
            for name, runs in self.methods.items()
            for seed, trial, value, accuracy in zip(
                runs.seeds,
                runs.runs,
                runs.val_values,
                self.compared.scores[name].accuracies,
                strict=True,
            )
        ]
        return pa.Table.from_pylist(rows)


def read_result(folder: Path) -> ComparisonResult | None:
    """Return the result in the folder of a comparison; None if there is none that can be read."""
    try:
        content = json.loads((folder / RESULT_NAME).read_bytes())
        return ComparisonResult(
            content["name"],
            folder,
            content["models"],
            {k: MethodRuns.from_mapping(v) for k, v in content["methods"].items()},
            Compared.from_mapping(content["compared"]),
            content["num_openings"],
            content["time_ms"],
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
