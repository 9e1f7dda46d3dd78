"""What a trial and the study say to each other through Ray Tune: names of keys and outcomes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from drtune_ray.training.records import EpochRecord, EpochReport

CONFIG_NUMBER = "number"
CONFIG_TRIAL = "trial"

OBJECTIVE = "best_val_accuracy"
EPOCH = "epoch"
OUTCOME = "outcome"
HISTORY = "history"
NUM_THREADS = "num_threads"

OUT_OF_MEMORY = "out of memory"


def trial_result(report: EpochReport, num_threads: int) -> dict[str, Any]:
    """An epoch's report as Tune carries it.

    The whole history goes along: a report that a killed driver never received is made good by the
    next one.
    """
    record = report.record
    return {
        # Without validation images there is none.
        OBJECTIVE: record.metrics.get(OBJECTIVE, math.nan) if record else math.nan,
        EPOCH: record.epoch if record else 0,
        OUTCOME: report.outcome or "",
        HISTORY: json.dumps([_without_steps(entry) for entry in report.history]),
        NUM_THREADS: num_threads,
        "done": report.outcome is not None,
    }


def failed_by_point(outcome: str, last: dict[str, Any] | None) -> dict[str, Any]:
    """The last result of a trial whose configuration made it impossible to go on."""
    empty = {OBJECTIVE: math.nan, EPOCH: 0, HISTORY: "[]", NUM_THREADS: 0}
    return (last or empty) | {OUTCOME: outcome, "done": True}


def result_history(result: dict[str, Any]) -> list[EpochRecord]:
    """The epochs that a result carries."""
    return [EpochRecord(**entry) for entry in json.loads(result.get(HISTORY) or "[]")]


def _without_steps(record: EpochRecord) -> dict[str, Any]:
    return asdict(record) | {"steps": []}
